"""The definition of an experiment: methods, data, duration and claims.

The records of an experiment are found by its settings: those of the experiment, and the name of a
method. A method with other settings needs another name.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import linen as nn

from bnp_experiments.claims import Claim
from bnp_experiments.errors import UsageError
from bnp_experiments.methods import Method
from bnp_experiments.training import Setup

SCALES = ("smoke", "laptop", "paper")
_EPOCHS = {"mnist1d": 5, "digits": 15}
_EPOCHS_ELSEWHERE = 3


@dataclasses.dataclass(frozen=True)
class Experiment:
  """One comparison of methods.

  Attributes:
    name: Name on the command line and in the records.
    title: Title, in one line.
    network: The network without normalization, which the methods add.
    dataset: Name of the data set.
    batch_sizes: The batch sizes; the figure has a panel for each.
    methods: The methods compared.
    rates: The grid of learning rates, the same for every method. If it has a single rate, nothing
      is selected, and a method with a rate in `paper_rates` takes that.
    epochs: Number of epochs; None for the default of the data set.
    seeds: Number of runs of each method.
    selection_epochs: Number of epochs of the trials that select the rate; None for `epochs`.
    images: Number of training images, drawn class by class; None for all.
    test_images: Number of test images; None for all.
    timed: Whether the time of a step is measured.
    untimed: Names of the methods whose time is not measured.
    augment: Name of the augmentation of the training images; None for none.
    decays: Epochs after which the learning rate is divided by ten.
    picture: Kind of picture: `curves` against epochs, `rates`, `batch_sizes`, `times`, or
      `conditioning`, for which condition numbers are measured.
    panels: Names of the methods in each row of the picture of rates or batch sizes; empty for all
      methods in one row.
    target: Test accuracy for which the picture of batch sizes shows the number of steps.
    place: Place in the paper; empty for experiments beyond the paper.
    paper_rates: The best learning rate that the paper states for each method (Tables 2 and 3).
    claims: The claims to judge.
    scale: `paper` for the paper's setting.
    scales: Changes of the other scales.
  """

  name: str
  title: str
  network: nn.Module
  dataset: str
  batch_sizes: tuple[int, ...]
  methods: tuple[Method, ...]
  rates: tuple[float, ...]
  epochs: int | None
  seeds: int
  selection_epochs: int | None = None
  images: int | None = None
  test_images: int | None = None
  timed: bool = False
  untimed: tuple[str, ...] = ()
  augment: str | None = None
  decays: tuple[int, ...] = ()
  picture: str = "curves"
  panels: tuple[tuple[str, ...], ...] = ()
  target: float = 0.0
  place: str = ""
  paper_rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
  claims: tuple[Claim, ...] = ()
  scale: str = "paper"
  scales: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict, repr=False)

  def at(self, scale: str) -> "Experiment":
    """Return this experiment at another scale."""
    return dataclasses.replace(self, scale=scale, **self.scales.get(scale, {}))

  @property
  def folder(self) -> str:
    """Name of the folder of its results."""
    return f"{self.name}-{self.dataset}-{self.scale}"

  @property
  def panel_methods(self) -> list[tuple[Method, ...]]:
    """The methods in each row of the picture."""
    rows = (tuple(m for m in self.methods if m.name in names) for names in self.panels)
    rows = [row for row in rows if row]
    return rows or [self.methods]

  @property
  def length(self) -> int:
    """Number of epochs."""
    return self.epochs or _EPOCHS.get(self.dataset, _EPOCHS_ELSEWHERE)

  @property
  def selection_length(self) -> int:
    """Number of epochs of the trials that select the rate."""
    return min(self.selection_epochs or self.length, self.length)

  @property
  def timed_methods(self) -> list[Method]:
    """The methods whose time of a step is measured."""
    return [method for method in self.methods if method.name not in self.untimed]

  @property
  def seed_list(self) -> list[int]:
    """Seeds of the tested runs; the trials have seed 0."""
    return list(range(1, self.seeds + 1))

  def check(self) -> None:
    """Raise UsageError for invalid values, before anything costly is done."""
    if self.epochs is not None and self.epochs < 1:
      raise UsageError(f"--epochs must be at least 1, found {self.epochs}")
    if self.seeds < 1:
      raise UsageError(f"--seeds must be at least 1, found {self.seeds}")
    if not self.methods:
      raise UsageError("--methods must name at least one method")
    if not self.batch_sizes:
      raise UsageError("--batch-sizes must name at least one batch size")
    if min(self.batch_sizes) < 1:
      raise UsageError(f"--batch-sizes must be at least 1, found {min(self.batch_sizes)}")

  def check_fits(self, images: int) -> None:
    """Raise UsageError if the training images cannot fill a batch."""
    if max(self.batch_sizes) > images:
      raise UsageError(
        f"--batch-sizes: {max(self.batch_sizes)} is more than the {images} images of "
        f"{self.dataset} that there are to train on"
      )

  def setup(self, method: Method, batch_size: int, images: int, classes: int) -> Setup:
    """Return the setup of a method at a batch size, for numbers of images and classes."""
    return Setup(
      method.adapt(self.network.clone(classes=classes)),
      method,
      batch_size,
      images // batch_size,
      self.decays,
      self.augment,
    )

  def rate_settings(self, method: Method, batch_size: int) -> dict[str, Any]:
    """Return the settings of the trials that select a learning rate."""
    return self._method_settings("rate", method, batch_size) | {
      "rates": list(self.rates),
      "selection_epochs": self.selection_length,
    }

  def epoch_settings(self, method: Method, batch_size: int, rate: float) -> dict[str, Any]:
    """Return the settings of the runs that are tested after each epoch."""
    return self._method_settings("epoch", method, batch_size) | {
      "rate": rate,
      "seeds": self.seed_list,
    }

  def time_settings(self, batch_size: int) -> dict[str, Any]:
    """Return the settings of the measured times of a step."""
    methods = [method.name for method in self.timed_methods]
    return self._settings("step_time", batch_size) | {"methods": methods}

  def conditioning_settings(self, method: Method, batch_size: int, rate: float) -> dict[str, Any]:
    """Return the settings of the measured condition numbers of all runs."""
    return self._method_settings("conditioning", method, batch_size) | {
      "rate": rate,
      "epochs": self.length,
    }

  def _method_settings(self, kind: str, method: Method, batch_size: int) -> dict[str, Any]:
    return self._settings(kind, batch_size) | {
      "method": method.name,
      # Records of the paper's start have None here.
      "debias": method.debias or None,
    }

  def _settings(self, kind: str, batch_size: int) -> dict[str, Any]:
    return {
      "kind": kind,
      "experiment": self.name,
      "dataset": self.dataset,
      "network": self.network.title,
      "batch_size": batch_size,
      "images": self.images,
      "test_images": self.test_images,
      "augment": self.augment,
      # Records without decays have None here.
      "decays": list(self.decays) or None,
    }
