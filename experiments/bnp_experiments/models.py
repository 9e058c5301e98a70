"""The paper's networks, as Flax modules with a choice of normalization layer.

The residual networks and transformers of other modules take the same `Norm`. Every network maps
images (or tokens) and `train` to logits and has the fields `norm` and `classes` and a `title`. BNP
covers all its linear layers.
"""

from collections.abc import Callable
import itertools
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

import bnp_optax
from bnp_optax import normalization

Norm = Callable[[bool], nn.Module]
"""Function that returns a normalization layer, for training if its argument is True."""


def batch_norm(train: bool) -> nn.Module:
  """Return BatchNorm with the defaults of TensorFlow, which the paper uses."""
  return nn.BatchNorm(use_running_average=not train, momentum=0.99, epsilon=1e-3)


def layer_norm(train: bool) -> nn.Module:
  """Return LayerNorm with the defaults of TensorFlow, which the paper uses."""
  del train
  return nn.LayerNorm(epsilon=1e-3)


def batch_renorm(train: bool) -> nn.Module:
  """Return Batch Renormalization with the defaults of TensorFlow: no limits of r and d."""
  return normalization.BatchRenorm(
    use_running_average=not train, momentum=0.99, epsilon=1e-3, r_max=math.inf, d_max=math.inf
  )


def group_norm(
  train: bool, *, num_groups: int | None = 4, group_size: int | None = None
) -> nn.Module:
  """Return GroupNorm with PyTorch's epsilon, which the paper's residual networks use.

  The paper's "group size 4" (and 32 for ImageNet) is interpreted as 4 groups, the convention of Wu
  and He (2018) and of PyTorch; `functools.partial(group_norm, num_groups=None,
  group_size=4)` has 4 channels in each group.
  """
  del train
  return nn.GroupNorm(num_groups, group_size=group_size, epsilon=1e-5)


def find_layers(model: nn.Module, inputs: Any, *, train: bool = False) -> bnp_optax.Layers:
  """Find the layers of a network. Only parameters named in its `without_bnp` may lack BNP."""
  ignore = getattr(model, "without_bnp", ())
  return bnp_optax.linen.layers(model, inputs, train=train, strict=True, ignore=ignore)


def normalize(hidden: jax.Array, norm: Norm | None, train: bool) -> jax.Array:
  """Apply a new normalization layer of the calling module; return `hidden` without a norm."""
  return hidden if norm is None else norm(train)(hidden)


def with_channels(images: jax.Array) -> jax.Array:
  """Return images `[batch, height, width, channels]`; the channels may be missing."""
  return images if images.ndim == 4 else images[..., None]


def max_pool(hidden: jax.Array) -> jax.Array:
  """Apply 2 x 2 max pooling without padding to maps `[batch, height, width, channels]`.

  It is a maximum over axes, because on a CPU the gradient of `flax.linen.max_pool` takes twice the
  time of the rest of the paper's convolutional network.
  """
  batch, height, width, channels = hidden.shape
  hidden = hidden[:, : height // 2 * 2, : width // 2 * 2]
  return hidden.reshape(batch, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


def convolve_by_product(
  images: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **options: Any
) -> jax.Array:
  """Compute a 2-D convolution without padding as one matrix product over shifted images.

  On an accelerator `jax.vmap` of it over kernels is a batched matrix product. That of
  `jax.lax.conv_general_dilated` is a convolution in groups, which is many times slower.

  Args:
    images: Maps `[batch, height, width, channels]`.
    kernel: Kernel `[window height, window width, channels, features]`.
    strides: The two strides.
    padding: "VALID".
    **options: The other options of `flax.linen.Conv`, at their defaults.

  Returns:
    Maps `[batch, height, width, features]`.
  """
  assert padding == "VALID"
  assert options.get("feature_group_count", 1) == 1
  dilations = (options.get(f"{side}_dilation") or () for side in ("lhs", "rhs"))
  assert all(dilation == 1 for sizes in dilations for dilation in sizes)
  window = kernel.shape[:2]
  height, width = (
    (size - k) // stride + 1
    for size, k, stride in zip(images.shape[1:3], window, strides, strict=True)
  )
  shifted = [
    images[:, i : i + strides[0] * height : strides[0], j : j + strides[1] * width : strides[1]]
    for i, j in itertools.product(*map(range, window))
  ]
  return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


class MLP(nn.Module):
  """The fully connected network of section 5: hidden layers h -> norm(relu(W h + b)).

  The norm acts on the inputs of the next layer (eq. 2), and not on the images.

  Attributes:
    features: Width of each hidden layer.
    classes: Number of outputs.
    norm: Function that returns a normalization layer; None for a network without normalization.
  """

  features: tuple[int, ...] = (100, 100, 100)
  classes: int = 10
  norm: Norm | None = None

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Map images `[batch, ...]`, flattened, to logits `[batch, classes]`."""
    hidden = images.reshape(len(images), -1)
    for width in self.features:
      hidden = nn.relu(nn.Dense(width, kernel_init=nn.initializers.glorot_uniform())(hidden))
      hidden = normalize(hidden, self.norm, train)
    return nn.Dense(self.classes, kernel_init=nn.initializers.glorot_uniform())(hidden)

  @property
  def title(self) -> str:
    """Name of the network in figures and records, without its norm and its output layer."""
    return "FC " + "-".join(map(str, self.features))


class CNN(nn.Module):
  """The convolutional network of section 5, TensorFlow's tutorial network with 32-64-32 filters.

  3 x 3 convolutions without padding, 2 x 2 max pooling after all but the last of them, a hidden
  dense layer and the output layer: `norm(pool(relu(W h + b)))`. The norm acts on the inputs of the
  next layer (eq. 2), which is after pooling, and on the channels of a feature map, which is before
  flattening.

  Attributes:
    filters: Channels of each convolution.
    width: Width of the hidden dense layer.
    classes: Number of outputs.
    norm: Function that returns a normalization layer; None for a network without normalization.
    convolve: Function that computes the convolutions; None for `jax.lax.conv_general_dilated`.
  """

  filters: tuple[int, ...] = (32, 64, 32)
  width: int = 64
  classes: int = 10
  norm: Norm | None = None
  convolve: Callable[..., jax.Array] | None = None

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Map images `[batch, height, width]` or `[..., channels]` to logits `[batch, classes]`."""
    glorot = nn.initializers.glorot_uniform()
    hidden = with_channels(images)
    for number, channels in enumerate(self.filters, start=1):
      convolution = nn.Conv(
        channels,
        (3, 3),
        padding="VALID",
        kernel_init=glorot,
        conv_general_dilated=self.convolve,
      )
      hidden = nn.relu(convolution(hidden))
      if number < len(self.filters):
        hidden = max_pool(hidden)
      hidden = normalize(hidden, self.norm, train)
    hidden = hidden.reshape(len(hidden), -1)
    hidden = nn.relu(nn.Dense(self.width, kernel_init=glorot)(hidden))
    hidden = normalize(hidden, self.norm, train)
    return nn.Dense(self.classes, kernel_init=glorot)(hidden)

  @property
  def title(self) -> str:
    """Name of the network in figures and records, without its norm and its output layer."""
    return f"CNN {'-'.join(map(str, self.filters))}, FC {self.width}"
