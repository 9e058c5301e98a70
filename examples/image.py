"""An image as a network from coordinates (x, y) to colours, 64 pixels in each step.

The image is `china.jpg` of scikit-learn, reduced to 60 x 90 pixels. A ReLU network of the plain
coordinates learns it slowly. The score is the PSNR on a tenth of the pixels, which are held out;
another tenth is the validation data.

python examples/image.py
"""

from typing import Any

import flax.linen as nn
import gallery
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_sample_image

import bnp_optax

STEPS, EVERY, PIXELS = 6_000, 500, 64


class Network(nn.Module):
  """The fully connected network 2-100-100-100-3."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Return the colours at coordinates ``[pixels, 2]``."""
    for _ in range(3):
      x = nn.relu(nn.Dense(100)(x))
    return nn.Dense(3)(x)


def load() -> tuple[np.ndarray, np.ndarray]:
  """Return the coordinates and the colours of all pixels, in a random order."""
  colours = load_sample_image("china.jpg")[:420, :630].astype(np.float32) / 255
  colours = colours.reshape(60, 7, 90, 7, 3).mean(axis=(1, 3))
  y, x = np.meshgrid(np.linspace(0, 1, 60), np.linspace(0, 1.5, 90), indexing="ij")
  order = np.random.default_rng(0).permutation(60 * 90)
  places = np.stack([x, y], axis=-1).reshape(-1, 2).astype(np.float32)
  return places[order], colours.reshape(-1, 3)[order]


PLACES, COLOURS = map(jnp.asarray, load())
TENTH = len(PLACES) // 10
MODEL = Network()


def loss_fn(params: Any, pixels: jax.Array) -> tuple[jax.Array, Any]:
  """Return the mean square error on pixels, and the statistics."""
  with bnp_optax.linen.sow_statistics():
    colours, aux = MODEL.apply({"params": params}, PLACES[pixels], mutable=["intermediates"])
  return jnp.mean((colours - COLOURS[pixels]) ** 2), aux["intermediates"]


def psnr(params: Any, part: slice) -> jax.Array:
  """Return the peak signal-to-noise ratio on some pixels, in dB."""
  wrong = MODEL.apply({"params": params}, PLACES[part]) - COLOURS[part]
  return -10 * jnp.log10(jnp.mean(wrong**2))


@gallery.side_by_side
def run(method: gallery.Method, rate: jax.Array, seed: jax.Array) -> gallery.Scores:
  """Train one network."""
  key = jax.random.key(seed)
  params = MODEL.init(key, PLACES[:1])["params"]
  tx = method.optimizer(rate)

  def step(carry: Any, pixels: jax.Array) -> tuple[Any, None]:
    params, opt_state = carry
    grads, stats = jax.grad(loss_fn, has_aux=True)(params, pixels)
    updates, opt_state = tx.update(grads, opt_state, params, stats=stats)
    return (optax.apply_updates(params, updates), opt_state), None

  def stretch(carry: Any, pixels: jax.Array) -> tuple[Any, jax.Array]:
    carry, _ = jax.lax.scan(step, carry, pixels)
    return carry, psnr(carry[0], slice(TENTH))

  pixels = jax.random.randint(key, (STEPS // EVERY, EVERY, PIXELS), 2 * TENTH, len(PLACES))
  (params, _), curve = jax.lax.scan(stretch, (params, tx.init(params)), pixels)
  return gallery.Scores(psnr(params, slice(TENTH, 2 * TENTH)), curve[-1], curve)


if __name__ == "__main__":
  title = f"An image of 60 x 90 pixels, FC 100-100-100, {PIXELS} pixels a step, {STEPS:,} steps"
  gallery.compare("image", title, run, "PSNR on other pixels, dB", up=True)
