"""The paper's residual networks, as Flax modules with an optional normalization layer.

The networks are those of He et al., Deep Residual Learning for Image Recognition, CVPR 2016 (2016a)
and Identity Mappings in Deep Residual Networks, ECCV 2016 (2016b), with any normalization layer or
none. Convolutions have biases in networks without normalization, or if `use_bias` is True: BNP
subtracts the mean of a layer's inputs by means of its bias, and GroupNorm does not cancel that
bias. Weights are He-normal without truncation, as in PyTorch, which the paper uses for these
networks.
"""

from collections.abc import Callable
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from bnp_experiments.models import Norm, normalize


def batch_norm(train: bool) -> nn.Module:
  """Return BatchNorm with the momentum and epsilon of PyTorch."""
  return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)


class ResNet(nn.Module):
  """The residual network for CIFAR, of 6n + 2 layers (2016a, Section 4.2).

  A 3 x 3 convolution of 16 channels, three stages of n blocks with 16, 32 and 64 channels, the mean
  over positions, and the output layer. Shortcuts have no parameters (option A): if the number of
  channels doubles, they drop every other position and pad the new channels with zeros.

  Attributes:
    depth: Number of layers with weights: 8, 14, 20, ..., 110.
    preactivation: Whether normalization and ReLU come before each convolution (2016b, Figure 4e).
    classes: Number of outputs.
    norm: Function that returns a normalization layer; None for a network without normalization.
    init_scale: Factor of He's initial weights.
    use_bias: Whether convolutions have biases; None for biases in networks without normalization.
    zero_init: Whether blocks start as their shortcuts: the last weights of each block are zero, as
      in Zhang et al., Fixup Initialization, ICLR 2019.
  """

  depth: int = 20
  preactivation: bool = False
  classes: int = 10
  norm: Norm | None = None
  init_scale: float = 1.0
  use_bias: bool | None = None
  zero_init: bool = False

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Map images `[batch, height, width, channels]` to logits `[batch, classes]`."""
    blocks, rest = divmod(self.depth - 2, 6)
    if rest or blocks < 1:
      raise ValueError(f"A residual network for CIFAR has 6n + 2 layers, not {self.depth}.")
    conv = _conv(self.init_scale, self.norm is None if self.use_bias is None else self.use_bias)
    hidden = _activate(conv(16, (3, 3))(images), self.norm, train)
    for stage, channels in enumerate((16, 32, 64)):
      for number in range(blocks):
        hidden = Block(
          channels,
          conv,
          self.norm,
          stride=2 if stage and not number else 1,
          order=_POST if not self.preactivation else _PRE if stage or number else _FIRST,
          zero_init=self.zero_init,
        )(hidden, train=train)
    if self.preactivation:
      hidden = _activate(hidden, self.norm, train)
    return nn.Dense(self.classes, kernel_init=_he_normal(self.init_scale))(_pool(hidden))

  @property
  def title(self) -> str:
    """Name of the network in figures and records, without its norm."""
    return f"{'preactivation ' * self.preactivation}ResNet-{self.depth}"


class ResNet18(nn.Module):
  """ResNet-18 for ImageNet (2016a, Table 1).

  A 7 x 7 convolution and 3 x 3 max pooling, both with stride 2, four stages of two blocks with 64
  to 512 channels, the mean over positions, and the output layer. If the number of channels doubles,
  the shortcut is a 1 x 1 convolution (option B).

  Attributes:
    classes: Number of outputs.
    norm: Function that returns a normalization layer; None for a network without normalization.
    init_scale: Factor of He's initial weights.
    use_bias: Whether convolutions have biases; None for biases in networks without normalization.
  """

  classes: int = 1000
  norm: Norm | None = None
  init_scale: float = 1.0
  use_bias: bool | None = None

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Map images `[batch, height, width, channels]` to logits `[batch, classes]`."""
    conv = _conv(self.init_scale, self.norm is None if self.use_bias is None else self.use_bias)
    hidden = _activate(conv(64, (7, 7), strides=2, padding=3)(images), self.norm, train)
    # ReLU outputs are not negative, so padding with zeros does not change the maxima.
    hidden = jnp.pad(hidden, ((0, 0), (1, 1), (1, 1), (0, 0)))
    hidden = nn.max_pool(hidden, (3, 3), strides=(2, 2))
    for stage, channels in enumerate((64, 128, 256, 512)):
      for number in range(2):
        stride = 2 if stage and not number else 1
        block = Block(channels, conv, self.norm, stride=stride, projection=stride == 2)
        hidden = block(hidden, train=train)
    return nn.Dense(self.classes, kernel_init=_he_normal(self.init_scale))(_pool(hidden))

  @property
  def title(self) -> str:
    """Name of the network in figures and records, without its norm."""
    return "ResNet-18"


# Positions of normalization and ReLU in a block. Post: after each convolution, with the last ReLU
# after the sum (2016a). Pre: before each convolution (2016b). First: as pre, but the input of the
# block is already normalized and activated.
_POST, _PRE, _FIRST = "post", "pre", "first"


class Block(nn.Module):
  """Two 3 x 3 convolutions, whose output is added to a shortcut.

  Normalization and ReLU before a convolution apply to the residual branch only, and also to the
  shortcut if the shape changes (2016b, in the authors' code).

  Attributes:
    channels: Number of channels of both convolutions.
    conv: Function that returns a convolution.
    norm: Function that returns a normalization layer; None for no normalization.
    stride: Stride of the first convolution.
    projection: Whether the shortcut is a 1 x 1 convolution instead of having no parameters.
    order: Position of normalization and ReLU.
    zero_init: Whether the weights of the second convolution start at zero.
  """

  channels: int
  conv: Callable[..., nn.Module]
  norm: Norm | None
  stride: int = 1
  projection: bool = False
  order: str = _POST
  zero_init: bool = False

  @nn.compact
  def __call__(self, inputs: jax.Array, *, train: bool) -> jax.Array:
    """Map `[batch, height, width, channels]` to the same shape, or to half the height and width."""
    hidden = _activate(inputs, self.norm, train) if self.order == _PRE else inputs
    changes = self.stride > 1 or inputs.shape[-1] != self.channels
    shortcut = hidden if changes else inputs
    hidden = self.conv(self.channels, (3, 3), strides=self.stride)(hidden)
    last = {"kernel_init": nn.initializers.zeros} if self.zero_init else {}
    hidden = self.conv(self.channels, (3, 3), **last)(_activate(hidden, self.norm, train))
    if self.order == _POST:
      hidden = normalize(hidden, self.norm, train)
    if self.projection:
      shortcut = self.conv(self.channels, (1, 1), strides=self.stride, padding=0)(shortcut)
      shortcut = normalize(shortcut, self.norm, train)
    elif changes:
      missing = self.channels - shortcut.shape[-1]
      shortcut = shortcut[:, :: self.stride, :: self.stride]
      shortcut = jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (0, missing)))
    return nn.relu(hidden + shortcut) if self.order == _POST else hidden + shortcut


def _activate(hidden: jax.Array, norm: Norm | None, train: bool) -> jax.Array:
  return nn.relu(normalize(hidden, norm, train))


def _pool(hidden: jax.Array) -> jax.Array:
  return jnp.mean(hidden, axis=(1, 2))


def _conv(init_scale: float, use_bias: bool) -> Callable[..., Any]:
  kernel_init = _he_normal(init_scale)
  return functools.partial(nn.Conv, padding=1, use_bias=use_bias, kernel_init=kernel_init)


def _he_normal(scale: float) -> nn.initializers.Initializer:
  return nn.initializers.variance_scaling(2.0 * scale**2, "fan_in", "normal")
