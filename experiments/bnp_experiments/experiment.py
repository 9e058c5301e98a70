"""What an experiment is: a value that says what is compared, on what, for how long, and why.

Its settings are what its records are found by, so a value that changes a result must be in them.
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
_EPOCHS = {"digits": 15}
_EPOCHS_ELSEWHERE = 3


@dataclasses.dataclass(frozen=True)
class Experiment:
  """One comparison of methods.

  Attributes:
    name: What the command line and the records call it.
    title: What it shows, in one line.
    network: The network, without norm; each method adds its own.
    dataset: Name of the data set.
    batch_sizes: The batch sizes; one panel of the figure each.
    methods: The methods compared.
    rates: The learning rates to choose from, the same ones for every method. If there is one
      alone, nothing is chosen, and a method that has a rate in `paper_rates` takes that.
    epochs: How long to train; None for what suits the data set.
    seeds: How many runs of each method.
    selection_epochs: How long the runs train that choose the rate; None for as long as the others.
    images: How many training images, drawn class by class; None for all.
    test_images: How many test images; None for all.
    timed: Whether the time of a step is measured too.
    augment: Name of the augmentation of the training images; None for none.
    decays: After which epochs the learning rate is divided by ten.
    picture: Which picture shows it: `curves` against epochs, `rates`,
      `batch_sizes`, `times`, or `conditioning`, which is measured then.
    target: The test accuracy that the picture of batch sizes shows the steps to.
    place: Where the paper has it; empty for what goes beyond the paper.
    paper_rates: The best learning rate that the paper states for each method (Tables 2 and 3).
    claims: What is claimed of it.
    scale: `paper` for the paper's own setting.
    scales: What the other scales change.
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
  augment: str | None = None
  decays: tuple[int, ...] = ()
  picture: str = "curves"
  target: float = 0.0
  place: str = ""
  paper_rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
  claims: tuple[Claim, ...] = ()
  scale: str = "paper"
  scales: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict, repr=False)

  def at(self, scale: str) -> "Experiment":
    """This experiment at another scale."""
    return dataclasses.replace(self, scale=scale, **self.scales.get(scale, {}))

  @property
  def folder(self) -> str:
    """The folder of its results, among those of all experiments."""
    return f"{self.name}-{self.dataset}-{self.scale}"

  @property
  def length(self) -> int:
    """How many epochs to train."""
    return self.epochs or _EPOCHS.get(self.dataset, _EPOCHS_ELSEWHERE)

  @property
  def selection_length(self) -> int:
    """How many epochs the runs train that choose the rate."""
    return min(self.selection_epochs or self.length, self.length)

  @property
  def seed_list(self) -> list[int]:
    """The seeds of the runs; seed 0 is that of the runs that choose the learning rate."""
    return list(range(1, self.seeds + 1))

  def check(self) -> None:
    """Refuses values that make no sense, before anything costly is done."""
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
    """Refuses a batch that the training images cannot fill."""
    if max(self.batch_sizes) > images:
      raise UsageError(
        f"--batch-sizes: {max(self.batch_sizes)} is more than the {images} images of "
        f"{self.dataset} that there are to train on"
      )

  def setup(self, method: Method, batch_size: int, images: int, classes: int) -> Setup:
    """How a method trains at a batch size on so many images of so many classes."""
    return Setup(
      method.adapt(self.network.clone(classes=classes)),
      method,
      batch_size,
      images // batch_size,
      self.decays,
      self.augment,
    )

  def rate_settings(self, method: Method, batch_size: int) -> dict[str, Any]:
    """The settings of the runs that choose a learning rate."""
    return self._settings("rate", batch_size) | {
      "method": method.name,
      "rates": list(self.rates),
      "selection_epochs": self.selection_length,
    }

  def epoch_settings(self, method: Method, batch_size: int, rate: float) -> dict[str, Any]:
    """The settings of the runs that are tested after each epoch."""
    return self._settings("epoch", batch_size) | {
      "method": method.name,
      "rate": rate,
      "seeds": self.seed_list,
    }

  def time_settings(self, batch_size: int) -> dict[str, Any]:
    """The settings under which the time of a step is measured."""
    methods = [method.name for method in self.methods]
    return self._settings("step_time", batch_size) | {"methods": methods}

  def conditioning_settings(self, method: Method, batch_size: int, rate: float) -> dict[str, Any]:
    """The settings under which condition numbers are measured."""
    return self._settings("conditioning", batch_size) | {
      "method": method.name,
      "rate": rate,
      "epochs": self.length,
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
      # A schedule depends on how long it is meant to be.
      "decays": list(self.decays) or None,
    }
