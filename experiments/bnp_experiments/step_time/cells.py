"""The cells of `bnp-optax run step-time`: networks, batch sizes and methods."""

from collections.abc import Iterable, Sequence
import dataclasses
from typing import Any

from flax import linen as nn
import jax
import optax

from bnp_experiments import methods
from bnp_experiments.methods import SGD, Method
from bnp_experiments.models import CNN, MLP
from bnp_experiments.resnet import ResNet
from bnp_experiments.transformers import ViT

CLASSES = 10
_IMAGE = (32, 32, 3)

BNP_SGD = Method("bnp_sgd", "bnp(SGD)", "#88CCEE", "8", optax.sgd, "around", debias=True)
# All methods have the default start of the running statistics, which has one more vector of state.
_BNP = dataclasses.replace(methods.BNP_DEBIAS, name="bnp")
_BNP_ADAM = dataclasses.replace(methods.BNP_ADAM_DEBIAS, name="bnp_adam")
_BNP_MOMENTUM = dataclasses.replace(methods.BNP_MOMENTUM, label="bnp(momentum)", debias=True)
_FEW = (SGD, methods.BATCHNORM, _BNP, methods.ADAM, _BNP_ADAM)
_MANY = (
  *_FEW,
  methods.LAYERNORM,
  methods.GROUPNORM,
  methods.MOMENTUM,
  _BNP_MOMENTUM,
  BNP_SGD,
)
_FOUR = (SGD, _BNP, methods.ADAM, _BNP_ADAM)
_TWO = (SGD, _BNP)


class Stack(nn.Module):
  """Equal dense layers, one after another or as one layer under `flax.linen.scan`.

  Attributes:
    depth: Number of these layers.
    scanned: Whether they are scanned.
    width: Their width.
    norm: Always None: there is no normalization.
  """

  depth: int
  scanned: bool = False
  width: int = 32
  norm: None = None

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Map images `[batch, ...]`, flattened, to logits `[batch, classes]`."""
    del train
    hidden = nn.Dense(self.width)(images.reshape(len(images), -1))
    if self.scanned:
      scan = nn.scan(
        _StackLayer,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        length=self.depth,
      )
      hidden, _ = scan(self.width)(hidden)
    else:
      for _ in range(self.depth):
        hidden, _ = _StackLayer(self.width)(hidden)
    return nn.Dense(CLASSES)(hidden)

  @property
  def title(self) -> str:
    """Name of the network in figures and records."""
    return f"{self.depth} layers of {self.width}{', scanned' * self.scanned}"


class _StackLayer(nn.Module):
  width: int

  @nn.compact
  def __call__(self, hidden: jax.Array) -> tuple[jax.Array, None]:
    return nn.relu(nn.Dense(self.width)(hidden)), None


@dataclasses.dataclass(frozen=True)
class Cell:
  """One network at one batch size.

  Attributes:
    series: Quantity that grows from cell to cell: `batch`, `width`, `image`, `layers`, or empty.
    network: The network, without norm.
    shape: The shape of an image.
    batch_size: Number of images in a step.
    methods: The methods, plain SGD first.
  """

  series: str
  network: Any
  shape: tuple[int, ...]
  batch_size: int
  methods: tuple[Method, ...]

  @property
  def settings(self) -> dict[str, Any]:
    """Settings that its record is found by."""
    return {
      "kind": "step_cost",
      "series": self.series,
      "network": self.network.title,
      "image": list(self.shape),
      "batch_size": self.batch_size,
      "methods": [method.name for method in self.methods],
      "debias": any(method.debias for method in self.methods),
    }


def cells(scale: str) -> list[Cell]:
  """Return the cells of a scale: `smoke`, `laptop` or `paper`."""
  if scale == "smoke":
    return [
      *_batch_cells((1, 16), _FEW),
      *_width_cells((128, 256)),
      *_image_cells((32,)),
      *_layer_cells((2, 4)),
    ]
  sizes = (1, 2, 6, 16, 60, 256, 512)
  networks = (MLP((4096, 4096)), CNN(), ResNet(), ViT())
  if scale == "laptop":
    return [
      *_batch_cells(sizes, _MANY),
      *_network_cells(zip(networks, ((60,), (128,), (128,), (64,)), strict=True)),
      *_width_cells((128, 512, 2048, 8192)),
      *_image_cells((32, 64, 128)),
      *_layer_cells((10, 100, 500)),
    ]
  return [
    *_batch_cells(sizes, _MANY),
    *_network_cells((network, sizes) for network in networks),
    *_width_cells((128, 256, 512, 1024, 2048, 4096, 8192)),
    *_image_cells((32, 64, 128, 256)),
    *_layer_cells((10, 100, 500)),
  ]


def _batch_cells(sizes: Sequence[int], compared: tuple[Method, ...]) -> list[Cell]:
  return [Cell("batch", MLP((100, 100)), _IMAGE, size, compared) for size in sizes]


def _network_cells(networks: Iterable[tuple[nn.Module, Sequence[int]]]) -> list[Cell]:
  return [Cell("", network, _IMAGE, size, _FEW) for network, sizes in networks for size in sizes]


def _width_cells(widths: Sequence[int]) -> list[Cell]:
  return [
    Cell("width", MLP((width,)), (width,), size, _FOUR) for size in (1, 60) for width in widths
  ]


def _image_cells(sizes: Sequence[int]) -> list[Cell]:
  return [Cell("image", CNN(), (size, size, 3), 16, _TWO) for size in sizes]


def _layer_cells(depths: Sequence[int]) -> list[Cell]:
  return [
    Cell("layers", Stack(depth, scanned), (32,), 16, _TWO)
    for scanned in (False, True)
    for depth in depths
  ]
