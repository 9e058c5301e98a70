"""Small transformers, as Flax modules with an optional normalization layer.

They go beyond the paper. Normalization comes before attention, before the dense layers of a block
and before the output layer, as in current transformers.
"""

from collections.abc import Callable

from flax import linen as nn
import jax
import jax.numpy as jnp

from bnp_experiments.models import Norm, normalize, with_channels


class ViT(nn.Module):
  """A vision transformer: patches, learned positions, blocks, mean over patches, output layer.

  The network follows Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021.

  Attributes:
    patch: Height and width of a patch.
    blocks: Number of blocks.
    width: Number of features of each token.
    heads: Number of attention heads.
    classes: Number of outputs.
    norm: Function that returns a normalization layer; None for a network without normalization.
    convolve: Function that computes the convolution; None for `jax.lax.conv_general_dilated`.
  """

  patch: int = 4
  blocks: int = 4
  width: int = 64
  heads: int = 4
  classes: int = 10
  norm: Norm | None = None
  convolve: Callable[..., jax.Array] | None = None
  without_bnp = ("positions",)

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Map images `[batch, height, width]` or `[..., channels]` to logits `[batch, classes]`."""
    size = (self.patch, self.patch)
    embed = nn.Conv(
      self.width, size, strides=size, padding="VALID", conv_general_dilated=self.convolve
    )
    tokens = embed(with_channels(images))
    hidden = _add_positions(self, tokens.reshape(len(tokens), -1, self.width))
    for _ in range(self.blocks):
      hidden = Block(self.heads, self.norm)(hidden, train=train)
    hidden = normalize(hidden, self.norm, train)
    return nn.Dense(self.classes)(jnp.mean(hidden, axis=1))

  @property
  def title(self) -> str:
    """Name of the network in figures and records, without its norm."""
    return f"ViT {self.blocks} x {self.width}, patch {self.patch}"


class LanguageModel(nn.Module):
  """A decoder that predicts the next token of a sequence, such as a text of characters.

  The network follows Radford et al., Language Models are Unsupervised Multitask Learners, 2019.

  Attributes:
    blocks: Number of blocks.
    width: Number of features of each token.
    heads: Number of attention heads.
    classes: Number of different tokens.
    norm: Function that returns a normalization layer; None for a network without normalization.
  """

  blocks: int = 2
  width: int = 64
  heads: int = 4
  classes: int = 128
  norm: Norm | None = None
  without_bnp = ("positions",)

  @nn.compact
  def __call__(self, tokens: jax.Array, *, train: bool) -> jax.Array:
    """Map tokens `[batch, time]` to logits `[batch, time, classes]` of the next tokens."""
    hidden = _add_positions(self, nn.Embed(self.classes, self.width)(tokens))
    mask = nn.make_causal_mask(tokens)
    for _ in range(self.blocks):
      hidden = Block(self.heads, self.norm)(hidden, mask, train=train)
    return nn.Dense(self.classes)(normalize(hidden, self.norm, train))

  @property
  def title(self) -> str:
    """Name of the network in figures and records, without its norm."""
    return f"language model {self.blocks} x {self.width}"


class Block(nn.Module):
  """Attention, and two dense layers with a hidden width four times as large, with shortcuts.

  Attributes:
    heads: Number of attention heads.
    norm: Function that returns a normalization layer; None for no normalization.
  """

  heads: int
  norm: Norm | None

  @nn.compact
  def __call__(self, hidden: jax.Array, mask: jax.Array | None = None, *, train: bool) -> jax.Array:
    """Map `[batch, time, width]` to the same shape; `mask` is True where a token may attend."""
    width = hidden.shape[-1]
    attention = nn.MultiHeadDotProductAttention(self.heads)
    hidden = hidden + attention(normalize(hidden, self.norm, train), mask=mask)
    inner = nn.gelu(nn.Dense(4 * width)(normalize(hidden, self.norm, train)))
    return hidden + nn.Dense(width)(inner)


def _add_positions(module: nn.Module, hidden: jax.Array) -> jax.Array:
  init = nn.initializers.normal(0.02)
  return hidden + module.param("positions", init, (1, *hidden.shape[1:]), hidden.dtype)
