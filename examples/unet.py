"""A 3-D U-Net, one volume in each step, without normalization, with InstanceNorm, with GroupNorm.

A volume of 12 x 12 x 12 has one to four bright balls to segment, and one to four dark ones, in a
gradient of light with noise. Each of 300 volumes is seen once. All methods use Adam, alone or in
`bnp`. The score is the Dice coefficient on 50 other volumes; 50 more are the validation data.

python examples/unet.py
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import gallery
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bnp_optax

VOLUMES, OTHERS, SIZE, PARTS = 300, 50, 12, 10


def convolve(x: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
  """Compute a 3 x 3 x 3 convolution as one product, which is faster for many networks at once."""
  for axis in (3, 2, 1):
    size, pad = x.shape[axis], [(0, 0)] * x.ndim
    pad[axis] = (1, 1)
    x = jnp.pad(x, pad)
    x = jnp.concatenate([jax.lax.slice_in_dim(x, i, i + size, axis=axis) for i in range(3)], -1)
  return x @ kernel.reshape(-1, kernel.shape[-1])


class UNet(nn.Module):
  """Two levels of 4 and 8 channels; the norm acts before each ReLU."""

  norm: Callable[[], nn.Module] | None

  def block(self, x: jax.Array, channels: int) -> jax.Array:
    """Apply a 3 x 3 x 3 convolution, the norm and ReLU."""
    x = nn.Conv(channels, (3, 3, 3), conv_general_dilated=convolve)(x)
    return nn.relu(x if self.norm is None else self.norm()(x))

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Map volumes ``[batch, depth, height, width, 1]`` to logits of the same shape."""
    fine = self.block(self.block(x, 4), 4)
    coarse = self.block(self.block(nn.avg_pool(fine, (2, 2, 2), (2, 2, 2)), 8), 8)
    up = coarse.repeat(2, axis=1).repeat(2, axis=2).repeat(2, axis=3)
    return nn.Dense(1)(self.block(jnp.concatenate([fine, up], axis=-1), 4))


class Method(NamedTuple):
  """A method: its label, colour, marker and optimizer, and the norm of its network."""

  label: str
  colour: str
  marker: str
  optimizer: Callable[[Any], optax.GradientTransformationExtraArgs]
  norm: Callable[[], nn.Module] | None


def group_norm() -> nn.Module:
  """Return GroupNorm with two groups."""
  return nn.GroupNorm(2)


ADAM, BNP_ADAM = gallery.ADAM.optimizer, gallery.BNP_ADAM.optimizer
METHODS = (
  Method("Adam", "#000000", "<", ADAM, None),
  Method("bnp(Adam)", "#D55E00", "h", BNP_ADAM, None),
  Method("InstanceNorm, Adam", "#CC79A7", "v", ADAM, nn.InstanceNorm),
  Method("InstanceNorm, bnp(Adam)", "#DDCC77", "X", BNP_ADAM, nn.InstanceNorm),
  Method("GroupNorm, Adam", "#661100", "d", ADAM, group_norm),
  Method("GroupNorm, bnp(Adam)", "#56B4E9", "p", BNP_ADAM, group_norm),
)


def make_volumes(seed: int, count: int) -> tuple[jax.Array, jax.Array]:
  """Return volumes and the bright balls in them ``[count, 12, 12, 12, 1]``."""
  rng = np.random.default_rng(seed)
  axes = np.stack(np.meshgrid(*[np.arange(SIZE)] * 3, indexing="ij"), axis=-1)

  def balls() -> np.ndarray:
    centres = rng.uniform(2, SIZE - 2, size=(rng.integers(1, 5), 3))
    radii = rng.uniform(1.5, 3.5, size=len(centres))
    return (np.linalg.norm(axes[..., None, :] - centres, axis=-1) < radii).any(axis=-1)

  bright, dark = (np.array([balls() for _ in range(count)], float) for _ in range(2))
  light = np.einsum("xyzi,ni->nxyz", axes / SIZE, rng.normal(size=(count, 3)))
  volumes = 0.5 * bright - 0.5 * dark + light + 0.3 * rng.normal(size=bright.shape)
  return jnp.float32(volumes[..., None]), jnp.float32(bright[..., None])


X, Y = make_volumes(0, VOLUMES)
VALIDATION, TEST = make_volumes(1, OTHERS), make_volumes(2, OTHERS)


@gallery.side_by_side
def run(method: Method, rate: jax.Array, seed: jax.Array) -> gallery.Scores:
  """Train one network."""
  model, tx = UNet(method.norm), method.optimizer(rate)
  key = jax.random.key(seed)
  params = model.init(key, X[:1])["params"]

  def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
    with bnp_optax.linen.sow_statistics():
      logits, aux = model.apply({"params": params}, x, mutable=["intermediates"])
    return optax.sigmoid_binary_cross_entropy(logits, y).mean(), aux["intermediates"]

  def step(carry: Any, i: jax.Array) -> tuple[Any, None]:
    params, opt_state = carry
    grads, stats = jax.grad(loss_fn, has_aux=True)(params, X[i][None], Y[i][None])
    updates, opt_state = tx.update(grads, opt_state, params, stats=stats)
    return (optax.apply_updates(params, updates), opt_state), None

  def dice(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    found = jax.lax.map(lambda x: model.apply({"params": params}, x[None])[0] > 0, x)
    return 2 * jnp.sum(found * y) / (jnp.sum(found) + jnp.sum(y))

  def part(carry: Any, order: jax.Array) -> tuple[Any, jax.Array]:
    carry, _ = jax.lax.scan(step, carry, order)
    return carry, dice(carry[0], *TEST)

  order = jax.random.permutation(key, VOLUMES).reshape(PARTS, -1)
  (params, _), curve = jax.lax.scan(part, (params, tx.init(params)), order)
  return gallery.Scores(dice(params, *VALIDATION), curve[-1], curve)


if __name__ == "__main__":
  title = f"3-D U-Net, one volume of 12 x 12 x 12 a step, {VOLUMES} steps"
  gallery.compare("unet", title, run, "Dice coefficient", methods=METHODS, up=True)
