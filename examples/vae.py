"""A variational autoencoder of scikit-learn's digits, six images in each step.

The encoder is 64-100-(8 + 8), the decoder 8-100-64, with Bernoulli pixels. One call gives the
statistics of all four layers. The score is the negative evidence lower bound in nats, with one
sample of the latents.

python examples/vae.py
"""

from typing import Any

import flax.linen as nn
import gallery
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import bnp_optax

EPOCHS, BATCH = 20, 6


class Autoencoder(nn.Module):
  """The encoder and the decoder."""

  @nn.compact
  def __call__(self, x: jax.Array, key: jax.Array) -> jax.Array:
    """Return the negative evidence lower bound of each image ``[batch]``."""
    mean, log_variance = jnp.split(nn.Dense(16)(nn.relu(nn.Dense(100)(x))), 2, axis=-1)
    noise = jax.random.normal(key, mean.shape)
    latents = mean + jnp.exp(log_variance / 2) * noise
    logits = nn.Dense(64)(nn.relu(nn.Dense(100)(latents)))
    kl = 0.5 * jnp.sum(mean**2 + jnp.exp(log_variance) - 1 - log_variance, axis=-1)
    return kl + optax.sigmoid_binary_cross_entropy(logits, x).sum(axis=-1)


MODEL = Autoencoder()
ORDER = np.random.default_rng(0).permutation(1797)
IMAGES = jnp.asarray(load_digits().data[ORDER] / 16, jnp.float32)
TEST, VALIDATION, TRAIN = IMAGES[:300], IMAGES[300:597], IMAGES[597:]


def loss_fn(params: Any, x: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
  """Return the loss on a batch, and the statistics."""
  with bnp_optax.linen.sow_statistics():
    losses, aux = MODEL.apply({"params": params}, x, key, mutable=["intermediates"])
  return losses.mean(), aux["intermediates"]


@gallery.side_by_side
def run(method: gallery.Method, rate: jax.Array, seed: jax.Array) -> gallery.Scores:
  """Train one autoencoder."""
  key = jax.random.key(seed)
  params = MODEL.init(key, TRAIN[:1], key)["params"]
  tx = method.optimizer(rate)

  def step(carry: Any, batch: Any) -> tuple[Any, None]:
    params, opt_state = carry
    grads, stats = jax.grad(loss_fn, has_aux=True)(params, TRAIN[batch[0]], batch[1])
    updates, opt_state = tx.update(grads, opt_state, params, stats=stats)
    return (optax.apply_updates(params, updates), opt_state), None

  def epoch(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
    order = jax.random.permutation(key, len(TRAIN)).reshape(-1, BATCH)
    carry, _ = jax.lax.scan(step, carry, (order, jax.random.split(key, len(order))))
    return carry, MODEL.apply({"params": carry[0]}, TEST, jax.random.key(0)).mean()

  keys = jax.random.split(key, EPOCHS)
  (params, _), curve = jax.lax.scan(epoch, (params, tx.init(params)), keys)
  validation = MODEL.apply({"params": params}, VALIDATION, jax.random.key(0)).mean()
  return gallery.Scores(validation, curve[-1], curve)


if __name__ == "__main__":
  title = f"VAE of the digits, batch size {BATCH}, {EPOCHS} epochs"
  gallery.compare("vae", title, run, "negative ELBO, nats", up=False)
