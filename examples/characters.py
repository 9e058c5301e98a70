"""A transformer that predicts the next character, from four passages in each step.

Two blocks of width 64 with LayerNorm read 32 characters of Python's language reference, which is
part of Python. There are 64 classes: rare characters share one. The last tenth of the text is the
test data; the tenth before it is the validation data. The score is the cross-entropy in nats.

python examples/characters.py
"""

import collections
import pydoc_data.topics
from typing import Any

import flax.linen as nn
import gallery
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bnp_optax

STEPS, PARTS, BATCH, LENGTH, WIDTH, HEADS, KINDS = 1000, 10, 4, 32, 64, 4, 64


class Block(nn.Module):
  """Causal attention and two dense layers, each after LayerNorm, with residual connections."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Map ``[batch, length, width]`` to the same shape."""
    qkv = nn.Dense(3 * WIDTH)(nn.LayerNorm()(x))
    q, k, v = jnp.split(qkv.reshape(*x.shape[:-1], 3 * HEADS, -1), 3, axis=-2)
    attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + nn.Dense(WIDTH)(attended.reshape(x.shape))
    return x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))))


class Transformer(nn.Module):
  """The embedding of characters and positions, two blocks, and the logits."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Return the logits ``[batch, length, kinds]`` of the next characters."""
    positions = self.param("positions", nn.initializers.normal(0.02), (LENGTH, WIDTH))
    x = nn.Embed(KINDS, WIDTH)(x) + positions
    for _ in range(2):
      x = Block()(x)
    return nn.Dense(KINDS)(nn.LayerNorm()(x))


def read_passages() -> np.ndarray:
  """Return passages of the text ``[passages, length + 1]``, in order."""
  text = "".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
  common = [character for character, _ in collections.Counter(text).most_common(KINDS - 1)]
  codes = {character: code for code, character in enumerate(common)}
  coded = np.array([codes.get(character, KINDS - 1) for character in text], np.int32)
  return coded[: len(coded) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)


MODEL = Transformer()
PASSAGES = jnp.asarray(read_passages())
TRAIN, VALIDATION, TEST = jnp.split(
  PASSAGES, [8 * len(PASSAGES) // 10, 9 * len(PASSAGES) // 10], axis=0
)
# Evenly spaced passages are enough to measure with.
VALIDATION, TEST = VALIDATION[:: len(VALIDATION) // 200], TEST[:: len(TEST) // 200]


def loss_fn(params: Any, passages: jax.Array) -> tuple[jax.Array, Any]:
  """Return the loss on a batch, and the statistics."""
  # The mean is over the characters, the examples of the loss.
  with bnp_optax.linen.sow_statistics(example_axes=2):
    logits, aux = MODEL.apply({"params": params}, passages[:, :-1], mutable=["intermediates"])
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, passages[:, 1:])
  return losses.mean(), aux["intermediates"]


@gallery.side_by_side
def run(method: gallery.Method, rate: jax.Array, seed: jax.Array) -> gallery.Scores:
  """Train one transformer."""
  key = jax.random.key(seed)
  params = MODEL.init(key, TRAIN[:1, :-1])["params"]
  tx = method.optimizer(rate)

  def step(carry: Any, chosen: jax.Array) -> tuple[Any, None]:
    params, opt_state = carry
    grads, stats = jax.grad(loss_fn, has_aux=True)(params, TRAIN[chosen])
    updates, opt_state = tx.update(grads, opt_state, params, stats=stats)
    return (optax.apply_updates(params, updates), opt_state), None

  def part(carry: Any, order: jax.Array) -> tuple[Any, jax.Array]:
    carry, _ = jax.lax.scan(step, carry, order)
    return carry, loss_fn(carry[0], TEST)[0]

  order = jax.random.permutation(key, len(TRAIN))[: STEPS * BATCH].reshape(PARTS, -1, BATCH)
  (params, _), curve = jax.lax.scan(part, (params, tx.init(params)), order)
  return gallery.Scores(loss_fn(params, VALIDATION)[0], curve[-1], curve)


if __name__ == "__main__":
  title = f"Transformer on characters, {BATCH} passages of {LENGTH} a step, {STEPS} steps"
  gallery.compare("characters", title, run, "cross-entropy, nats", up=False)
