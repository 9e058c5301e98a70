"""Small transformers, as Flax modules with a free choice of normalization layer.

They go beyond the paper: normalization comes before attention and before the dense layers, and
before the output layer, as usual today.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp

from bnp_experiments.models import Norm, normalize, with_channels


class ViT(nn.Module):
  """A vision transformer: patches, learned positions, blocks, the mean over patches, the output.

  After Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021.

  Attributes:
    patch: Height and width of a patch.
    blocks: Number of blocks.
    width: Features of each token.
    heads: Heads of the attention.
    classes: Number of outputs.
    norm: Makes the normalization layers; None for a network without any.
  """

  patch: int = 4
  blocks: int = 4
  width: int = 64
  heads: int = 4
  classes: int = 10
  norm: Norm | None = None

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Maps images `[batch, height, width]` or `[..., channels]` to logits `[batch, classes]`."""
    size = (self.patch, self.patch)
    tokens = nn.Conv(self.width, size, strides=size, padding="VALID")(with_channels(images))
    hidden = _add_positions(self, tokens.reshape(len(tokens), -1, self.width))
    for _ in range(self.blocks):
      hidden = Block(self.heads, self.norm)(hidden, train=train)
    hidden = normalize(hidden, self.norm, train)
    return nn.Dense(self.classes)(jnp.mean(hidden, axis=1))

  @property
  def title(self) -> str:
    """What figures and records call this network, without its norm."""
    return f"ViT {self.blocks} x {self.width}, patch {self.patch}"


class LanguageModel(nn.Module):
  """A decoder that predicts the next of a sequence of tokens, such as characters.

  After Radford et al., Language Models are Unsupervised Multitask Learners, 2019.

  Attributes:
    blocks: Number of blocks.
    width: Features of each token.
    heads: Heads of the attention.
    classes: How many different tokens there are.
    norm: Makes the normalization layers; None for a network without any.
  """

  blocks: int = 2
  width: int = 64
  heads: int = 4
  classes: int = 128
  norm: Norm | None = None

  @nn.compact
  def __call__(self, tokens: jax.Array, *, train: bool) -> jax.Array:
    """Maps tokens `[batch, time]` to logits `[batch, time, classes]` of those that come next."""
    hidden = _add_positions(self, nn.Embed(self.classes, self.width)(tokens))
    mask = nn.make_causal_mask(tokens)
    for _ in range(self.blocks):
      hidden = Block(self.heads, self.norm)(hidden, mask, train=train)
    return nn.Dense(self.classes)(normalize(hidden, self.norm, train))

  @property
  def title(self) -> str:
    """What figures and records call this network, without its norm."""
    return f"language model {self.blocks} x {self.width}"


class Block(nn.Module):
  """Attention, and two dense layers four times as wide in between, each beside a shortcut.

  Attributes:
    heads: Heads of the attention.
    norm: Makes the normalization layers; None for none.
  """

  heads: int
  norm: Norm | None

  @nn.compact
  def __call__(self, hidden: jax.Array, mask: jax.Array | None = None, *, train: bool) -> jax.Array:
    """Maps `[batch, time, width]` to the same; `mask` is True where a token may look."""
    width = hidden.shape[-1]
    attention = nn.MultiHeadDotProductAttention(self.heads)
    hidden = hidden + attention(normalize(hidden, self.norm, train), mask=mask)
    inner = nn.gelu(nn.Dense(4 * width)(normalize(hidden, self.norm, train)))
    return hidden + nn.Dense(width)(inner)


def _add_positions(module: nn.Module, hidden: jax.Array) -> jax.Array:
  init = nn.initializers.normal(0.02)
  return hidden + module.param("positions", init, (1, *hidden.shape[1:]), hidden.dtype)
