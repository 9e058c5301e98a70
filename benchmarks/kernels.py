"""The cost of the two places where BNP reads large arrays, in several equivalent forms.

Measures: the time of the batch statistics in six forms, and of the end of a training step in seven.
Command: `taskset -c 1 python benchmarks/kernels.py`, two minutes.
Quoted by: docs/experiments/step.md, "Where the time goes".
"""

from collections.abc import Callable
import functools
from typing import Any

from common import repeated, time_in_turn
import jax
import jax.numpy as jnp
import numpy as np


def read_once(h: jax.Array) -> Any:
  """Compute the sum alone: the cost of reading the inputs once."""
  return jnp.sum(h, 0)


def two_passes(h: jax.Array) -> Any:
  """Compute the mean, then the squares about it, as the library does."""
  total = jnp.sum(h, 0)
  return total, jnp.sum((h - total / len(h)) ** 2, 0)


def raw_moments(h: jax.Array) -> Any:
  """Compute E[h] and E[h^2], which lose the variance of inputs with a large mean."""
  return jnp.sum(h, 0), jnp.sum(h * h, 0)


def shifted(h: jax.Array) -> Any:
  """Compute both moments about the first row, which does not wait for the mean."""
  d = h - h[0]
  return jnp.sum(d, 0), jnp.sum(d * d, 0)


def one_reduction(h: jax.Array) -> Any:
  """Compute the moments about the first row as one reduction with two results."""
  d, zero = h - h[0], np.float32(0)
  return jax.lax.reduce((d, d * d), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), (0,))


def products(h: jax.Array) -> Any:
  """Compute the mean and the squares about it as products with a vector of ones."""
  ones = jnp.ones((1, len(h)))
  total = (ones @ h)[0]
  return total, (ones @ (h - total / len(h)) ** 2)[0]


Update = tuple[jax.Array, jax.Array]


def sgd(g_w: jax.Array, g_b: jax.Array, mu: jax.Array, scale: jax.Array) -> Update:
  """Return the gradient without a preconditioner."""
  del mu, scale
  return g_w, g_b


def composed(g_w: jax.Array, g_b: jax.Array, mu: jax.Array, scale: jax.Array) -> Update:
  """Apply P after P^T: scale, then centre, as the library does."""
  root = jnp.sqrt(scale)
  z = g_w * root[:, None] - (mu * root)[:, None] * g_b
  return z * root[:, None], g_b - _product(mu * root, z)


def centred_first(g_w: jax.Array, g_b: jax.Array, mu: jax.Array, scale: jax.Array) -> Update:
  """Apply P after P^T: centre, then scale."""
  root = jnp.sqrt(scale)
  z = (g_w - mu[:, None] * g_b) * root[:, None]
  return z * root[:, None], g_b - _product(mu * root, z)


def updated(g_w: jax.Array, g_b: jax.Array, mu: jax.Array, scale: jax.Array) -> Update:
  """Compute step 5 from the updated gradient, as in the paper."""
  G_w = (g_w - mu[:, None] * g_b) * scale[:, None]
  return G_w, g_b - _product(mu, G_w)


def summed(g_w: jax.Array, g_b: jax.Array, mu: jax.Array, scale: jax.Array) -> Update:
  """Compute step 5 from the updated gradient as a plain sum."""
  G_w = (g_w - mu[:, None] * g_b) * scale[:, None]
  return G_w, g_b - jnp.sum(mu[:, None] * G_w, 0)


def algebra(g_w: jax.Array, g_b: jax.Array, mu: jax.Array, scale: jax.Array) -> Update:
  """Compute step 5 from the gradient itself, which cancels where means are large."""
  v = mu * scale
  G_w = (g_w - mu[:, None] * g_b) * scale[:, None]
  return G_w, g_b - (_product(v, g_w) - (v @ mu) * g_b)


def _product(v: jax.Array, w: jax.Array) -> jax.Array:
  return jnp.einsum("f,fo->o", v, w, precision=jax.lax.Precision.HIGHEST)


def step(precondition: Callable[..., Update]) -> Callable[..., Any]:
  """Return the end of a training step: the gradient of the weights, and the update."""

  def take(state: Any, h: Any, g: Any, mu: Any, scale: Any) -> Any:
    w, b = state
    G_w, G_b = precondition(h.T @ g, g.sum(0), mu, scale)
    return w - 1e-3 * G_w, b - 1e-3 * G_b

  return take


def before_the_product(state: Any, h: Any, g: Any, mu: Any, scale: Any) -> Any:
  """Precondition the inputs before they are multiplied by the gradient of the outputs."""
  w, b = state
  x = (h - mu) * scale
  return w - 1e-3 * (x.T @ g), b - 1e-3 * (g.sum(0) - (x @ mu) @ g)


def microseconds(functions: dict[str, Callable[[], Any]]) -> str:
  """Return the median times as cells of a table."""
  seconds = time_in_turn(functions, rounds=40, calls=10)
  return " | ".join(f"{1e6 * np.median(times):.0f}" for times in seconds.values())


def main() -> None:
  """Print both tables, in microseconds."""
  statistics = (read_once, two_passes, raw_moments, shifted, one_reduction, products)
  print("| rows x features |", " | ".join(f.__name__ for f in statistics), "|")
  for shape in ((16, 3072), (60, 3072), (512, 3072), (3840, 64), (115200, 32)):
    h = jax.random.normal(jax.random.key(0), shape)
    times = microseconds({f.__name__: functools.partial(jax.jit(f), h) for f in statistics})
    print(f"| {shape[0]} x {shape[1]} |", times, "|")
  forms = {f.__name__: step(f) for f in (sgd, composed, centred_first, updated, summed, algebra)}
  forms["before_the_product"] = before_the_product
  print("| kernel, batch |", " | ".join(forms), "|")
  for width, outputs, batch in (
    *((3072, 100, batch) for batch in (1, 2, 16, 60, 512)),
    (2048, 2048, 60),
  ):
    keys = jax.random.split(jax.random.key(0), 2)
    h = jax.random.normal(keys[0], (batch, width)) + 1
    g = jax.random.normal(keys[1], (batch, outputs))
    w, b, mu, scale = (jnp.ones(s) for s in ((width, outputs), outputs, width, width))
    times = microseconds(
      {
        name: repeated(jax.jit(f, donate_argnums=0), (w, b), h, g, mu, scale)
        for name, f in forms.items()
      }
    )
    print(f"| {width} x {outputs}, {batch} |", times, "|")


if __name__ == "__main__":
  main()
