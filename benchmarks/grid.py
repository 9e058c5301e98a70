"""The grid of `defaults.py`: its cells, settings, networks and examples."""

from collections.abc import Iterator
import functools
import itertools
import math
import pathlib
from typing import Any, NamedTuple

from bnp_experiments import models, transformers
from bnp_experiments.training import as_inputs
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bnp_optax

Key = tuple[str, str, int]
"""A network, an optimizer and a batch size."""

SEEDS = (1, 2, 3)
BATCH_SIZES = (60, 1, 512, 6, 128, 16, 2)
# Number of steps of FC and CNN, and of the transformers.
STEPS = {1: (1000, 600), 2: (1000, 600), 6: (1000, 600), 16: (600, 600)}
STEPS |= {60: (400, 400), 128: (200, 200), 512: (100, 100)}
NETWORKS = {
  "fc": "FC",
  "cnn": "CNN",
  "vit": "ViT",
  "vit-plain": "ViT without LayerNorm",
  "lm": "LM",
  "lm-plain": "LM without LayerNorm",
}
RATES = {
  "sgd": (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
  "momentum": (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
  "adam": (0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03),
  "muon": (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
}
OPTIMIZER_NAMES = {"sgd": "SGD", "momentum": "momentum", "adam": "Adam", "muon": "Muon"}
# Settings that train as lanes of one program, as pairs of lag_guard and the bound on the step. An
# infinite constant turns either off.
CORRECTED = {
  "debias": (math.inf, math.inf),
  "debias, lag_guard=2": (2.0, math.inf),
  "debias, bounded step": (math.inf, 0.03),
}
# Variants of debias, as pairs of the decay and the part of the steps for the warm-up.
VARIANTS = {
  "decay 0.9": (0.9, 0.0),
  "decay 0.95": (0.95, 0.0),
  "decay 0.999": (0.999, 0.0),
  "warm-up": (0.99, 0.1),
}
PROGRAMS = {
  "variants": VARIANTS,
  "q = 1": {"q = 1": (math.inf, math.inf)},
  "corrected": CORRECTED,
  "paper": {"paper": (math.inf, math.inf)},
  "alone": {"alone": (math.inf, math.inf)},
}


class Cell(NamedTuple):
  """One program: the settings of one name in `PROGRAMS`, for all rates and seeds."""

  program: str
  batch_size: int
  network: str
  optimizer: str

  @property
  def key(self) -> Key:
    """The network, the optimizer and the batch size."""
    return self.network, self.optimizer, self.batch_size


class Lane(NamedTuple):
  """One training run: a learning rate, the two numbers of a setting, and a seed."""

  rate: Any
  setting: Any
  seed: Any


def cells() -> Iterator[Cell]:
  """List the cells, those that decide first."""
  for programs in (("corrected", "paper"), ("alone",), ("variants",), ("q = 1",)):
    for batch_size, optimizer, network in itertools.product(BATCH_SIZES, RATES, NETWORKS):
      for program in programs:
        yield Cell(program, batch_size, network, optimizer)


def count_steps(cell: Cell) -> int:
  """Return the number of steps of a run."""
  return STEPS[cell.batch_size][cell.network[:2] in ("vi", "lm")]


def order(seed: int, count: int, cell: Cell) -> np.ndarray:
  """Return the examples of each step of a run: whole permutations, one after the other."""
  steps, generator = count_steps(cell), np.random.default_rng(seed)
  length = steps * cell.batch_size
  epochs = [generator.permutation(count) for _ in range(math.ceil(length / count))]
  return np.concatenate(epochs)[:length].astype(np.int32).reshape(steps, cell.batch_size)


def pack(path: pathlib.Path) -> None:
  """Write the examples to one file, small enough to travel."""
  # Not at the top: `run` needs no Pillow.
  from bnp_experiments import data

  images, text = data.load("cifar10"), data.load("pydoc")
  chosen = np.random.default_rng(0).permutation(len(images.y_train))[:20_000]
  x = images.x_train[chosen]
  # Differences of neighbours compress better; they wrap around and lose nothing.
  x[:, :, 1:] -= x[:, :, :-1].copy()
  np.savez_compressed(path, x=x, y=images.y_train[chosen], text_x=text.x_train, text_y=text.y_train)


@functools.cache
def examples(path: pathlib.Path, network: str) -> tuple[Any, Any, Any, Any]:
  """Return the training and the held-out examples of a network, on the device."""
  with np.load(path) as file:
    if network.startswith("lm"):
      x, y = file["text_x"], file["text_y"]
    else:
      x, y = np.cumsum(file["x"], axis=2, dtype=np.uint8), file["y"]
  last = len(x) // 10
  return jax.device_put((x[:-last], y[:-last], x[-last:], y[-last:]))


@functools.cache
def model_and_parameters(path: pathlib.Path, network: str) -> tuple[Any, Any]:
  """Return a network and its initial parameters for each seed."""
  # Other convolutions are slow under vmap over kernels, and on a CPU in a loop.
  convolve = models.convolve_by_product
  norm = None if network.endswith("plain") else lambda train: nn.LayerNorm()
  model = {
    "fc": models.MLP(),
    "cnn": models.CNN(convolve=convolve),
    "vit": transformers.ViT(norm=norm, convolve=convolve),
    "lm": transformers.LanguageModel(norm=norm),
  }[network.removesuffix("-plain")]
  x = as_inputs(examples(path, network)[0][:1])
  init = jax.jit(lambda seed: model.init(jax.random.key(seed), x, train=False)["params"])
  parameters = [init(seed) for seed in SEEDS]
  return model, jax.tree.map(lambda *leaves: np.stack(leaves), *parameters)


def as_batch(x: Any, y: Any) -> tuple[Any, Any]:
  """Return the inputs and the labels of a network for a batch of examples."""
  return as_inputs(x), y.astype(jnp.int32)


def make_optimizer(cell: Cell, lane: Lane, layers: Any) -> Any:
  """Return the optimizer of a lane."""
  rate = lane.rate
  if cell.program == "variants":
    steps = count_steps(cell) * lane.setting[1]
    rate = lambda count: lane.rate * jnp.minimum((count + 1) / jnp.maximum(steps, 1), 1)  # noqa: E731
  inner = {
    "sgd": optax.sgd,
    "momentum": functools.partial(optax.sgd, momentum=0.9),
    "adam": optax.adam,
    "muon": optax.contrib.muon,
  }[cell.optimizer](rate)
  if cell.program == "alone":
    return inner
  if cell.program == "defaults":
    return bnp_optax.bnp(inner, layers=layers)
  if cell.program == "paper":
    return bnp_optax.bnp(inner, debias=False, lag_guard=None, layers=layers)
  if cell.program == "variants":
    return bnp_optax.bnp(inner, decay=lane.setting[0], layers=layers)
  if cell.program == "q = 1":
    return bnp_optax.bnp(inner, scale_layers=False, layers=layers)
  guard, bound = lane.setting
  inner = optax.chain(inner, optax.adaptive_grad_clip(bound))
  return bnp_optax.bnp(inner, lag_guard=guard, layers=layers)
