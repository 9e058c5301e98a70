"""A 3-D U-Net, one volume a step: without normalization, with InstanceNorm, with GroupNorm.

A volume of 12 x 12 x 12 has one to four bright balls to segment, and one to four dark ones, in a
gradient of light with noise. Each of 120 volumes is seen once. All methods use Adam, alone or in
`bnp`. The score is the Dice coefficient on 50 other volumes; 50 more choose the rate.

python examples/unet.py
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import gallery
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bnp_optax

VOLUMES, OTHERS, SIZE, PARTS = 120, 50, 12, 4


class UNet(nn.Module):
  """Two levels of 4 and 8 channels; the norm acts before each ReLU."""

  norm: Callable[[], nn.Module] | None

  def block(self, x: jax.Array, channels: int) -> jax.Array:
    """Apply a 3 x 3 x 3 convolution, the norm and ReLU."""
    x = nn.Conv(channels, (3, 3, 3))(x)
    return nn.relu(x if self.norm is None else self.norm()(x))

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Map volumes ``[batch, depth, height, width, 1]`` to logits of the same shape."""
    fine = self.block(self.block(x, 4), 4)
    coarse = self.block(self.block(nn.avg_pool(fine, (2, 2, 2), (2, 2, 2)), 8), 8)
    up = coarse.repeat(2, axis=1).repeat(2, axis=2).repeat(2, axis=3)
    return nn.Conv(1, (1, 1, 1))(self.block(jnp.concatenate([fine, up], axis=-1), 4))


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


def make_volumes(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
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
  return volumes[..., None].astype(np.float32), bright[..., None].astype(np.float32)


def run(method: Method, rates: Sequence[float], seeds: Sequence[int]) -> gallery.Scores:
  """Train one network for each rate and seed; a loop in Python, as XLA loops slow convolutions."""
  model = UNet(method.norm)

  def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
    with bnp_optax.linen.sow_statistics():
      logits, aux = model.apply({"params": params}, x, mutable=["intermediates"])
    return optax.sigmoid_binary_cross_entropy(logits, y).mean(), aux["intermediates"]

  @jax.jit
  def step(params: Any, opt_state: Any, rate: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any]:
    grads, stats = jax.grad(loss_fn, has_aux=True)(params, x, y)
    updates, opt_state = method.optimizer(rate).update(grads, opt_state, params, stats=stats)
    return optax.apply_updates(params, updates), opt_state

  @jax.jit
  def dice(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    found = model.apply({"params": params}, x) > 0
    return 2 * jnp.sum(found * y) / (jnp.sum(found) + jnp.sum(y))

  def train(rate: float, seed: int) -> tuple[Any, list[Any]]:
    params = model.init(jax.random.key(seed), x[:1])["params"]
    opt_state, curve = method.optimizer(rate).init(params), []
    order = np.random.default_rng(seed).permutation(VOLUMES)
    for number, i in enumerate(order, start=1):
      params, opt_state = step(params, opt_state, rate, x[i : i + 1], y[i : i + 1])
      if number % (VOLUMES // PARTS) == 0:
        curve.append(dice(params, *test))
    return dice(params, *validation), curve

  x, y = make_volumes(0, VOLUMES)
  validation, test = make_volumes(1, OTHERS), make_volumes(2, OTHERS)
  scores, curves = zip(*map(train, rates, seeds), strict=True)
  return gallery.Scores(np.array(scores), np.array(curves)[:, -1], np.array(curves))


if __name__ == "__main__":
  title = f"3-D U-Net, one volume of 12 x 12 x 12 a step, {VOLUMES} steps"
  gallery.compare("unet", title, run, "Dice coefficient", methods=METHODS, up=True)
