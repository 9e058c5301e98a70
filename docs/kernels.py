"""What XLA makes of the two places where BNP reads large arrays, in the forms that were tried.

taskset -c 1 python docs/kernels.py    (a minute; the last table of performance.md)
"""

from collections.abc import Callable
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROUNDS, CALLS = 40, 10


def read_once(h: jax.Array) -> Any:
  """The sum alone: what a single reading of the inputs costs."""
  return jnp.sum(h, 0)


def two_passes(h: jax.Array) -> Any:
  """The mean, then the squares about it: what the library does."""
  total = jnp.sum(h, 0)
  return total, jnp.sum((h - total / len(h)) ** 2, 0)


def raw_moments(h: jax.Array) -> Any:
  """E[h^2] - E[h]^2, which loses the variance of inputs with a large mean."""
  return jnp.sum(h, 0), jnp.sum(h * h, 0)


def shifted(h: jax.Array) -> Any:
  """Both moments about the first row, which needs no mean before."""
  d = h - h[0]
  return jnp.sum(d, 0), jnp.sum(d * d, 0)


def one_reduction(h: jax.Array) -> Any:
  """The same as one reduction with two results."""
  d, zero = h - h[0], np.float32(0)
  return jax.lax.reduce((d, d * d), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), (0,))


def products(h: jax.Array) -> Any:
  """Both sums as products with a vector of ones."""
  ones = jnp.ones((1, len(h)))
  total = (ones @ h)[0]
  return total, (ones @ (h - total / len(h)) ** 2)[0]


Update = tuple[jax.Array, jax.Array]


def sgd(g_w: jax.Array, g_b: jax.Array, mu: jax.Array, scale: jax.Array) -> Update:
  """No preconditioner."""
  del mu, scale
  return g_w, g_b


def composed(g_w: jax.Array, g_b: jax.Array, mu: jax.Array, scale: jax.Array) -> Update:
  """P after P^T, which scales and then centres: what the library does."""
  root = jnp.sqrt(scale)
  z = g_w * root[:, None] - (mu * root)[:, None] * g_b
  return z * root[:, None], g_b - _product(mu * root, z)


def centred_first(g_w: jax.Array, g_b: jax.Array, mu: jax.Array, scale: jax.Array) -> Update:
  """The same, with the mean taken out before the scale."""
  root = jnp.sqrt(scale)
  z = (g_w - mu[:, None] * g_b) * root[:, None]
  return z * root[:, None], g_b - _product(mu * root, z)


def updated(g_w: jax.Array, g_b: jax.Array, mu: jax.Array, scale: jax.Array) -> Update:
  """Step 5 from the updated gradient, as the paper writes it."""
  G_w = (g_w - mu[:, None] * g_b) * scale[:, None]
  return G_w, g_b - _product(mu, G_w)


def summed(g_w: jax.Array, g_b: jax.Array, mu: jax.Array, scale: jax.Array) -> Update:
  """The same as a plain sum."""
  G_w = (g_w - mu[:, None] * g_b) * scale[:, None]
  return G_w, g_b - jnp.sum(mu[:, None] * G_w, 0)


def algebra(g_w: jax.Array, g_b: jax.Array, mu: jax.Array, scale: jax.Array) -> Update:
  """Step 5 from the gradient itself, which cancels where means are large."""
  v = mu * scale
  G_w = (g_w - mu[:, None] * g_b) * scale[:, None]
  return G_w, g_b - (_product(v, g_w) - (v @ mu) * g_b)


def _product(v: jax.Array, w: jax.Array) -> jax.Array:
  return jnp.einsum("f,fo->o", v, w, precision=jax.lax.Precision.HIGHEST)


def step(precondition: Callable[..., Update]) -> Callable[..., Any]:
  """The end of a training step: the gradient of the weights, and the update."""

  def take(state: Any, h: Any, g: Any, mu: Any, scale: Any) -> Any:
    w, b = state
    G_w, G_b = precondition(h.T @ g, g.sum(0), mu, scale)
    return w - 1e-3 * G_w, b - 1e-3 * G_b

  return take


def before_the_product(state: Any, h: Any, g: Any, mu: Any, scale: Any) -> Any:
  """The preconditioner on the inputs, before they are multiplied with the outputs' gradient."""
  w, b = state
  x = (h - mu) * scale
  return w - 1e-3 * (x.T @ g), b - 1e-3 * (g.sum(0) - (x @ mu) @ g)


def microseconds(functions: dict[str, Callable[..., Any]], state: Any, *args: Any) -> str:
  """The median time of each, in turn; where there is a state, it goes on from step to step."""
  donated = () if state is None else (0,)
  compiled = {name: jax.jit(f, donate_argnums=donated) for name, f in functions.items()}
  states = {name: jax.tree.map(jnp.copy, state) for name in compiled}
  taken: dict[str, list[float]] = {name: [] for name in compiled}
  for number in range(ROUNDS + 2):
    for name, f in compiled.items():
      start = time.perf_counter()
      for _ in range(CALLS):
        result = f(states[name], *args)
        states[name] = None if state is None else result
      jax.block_until_ready(result)
      if number >= 2:
        taken[name].append((time.perf_counter() - start) / CALLS)
  return " | ".join(f"{1e6 * np.median(times):.0f}" for times in taken.values())


def main() -> None:
  """Prints both tables, in microseconds."""
  statistics = (read_once, two_passes, raw_moments, shifted, one_reduction, products)
  print("| rows x features |", " | ".join(f.__name__ for f in statistics), "|")
  for shape in ((16, 3072), (60, 3072), (512, 3072), (3840, 64), (115200, 32)):
    h = jax.random.normal(jax.random.key(0), shape)
    times = microseconds({f.__name__: lambda _, h, f=f: f(h) for f in statistics}, None, h)
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
    times = microseconds(forms, (w, b), h, g, mu, scale)
    print(f"| {width} x {outputs}, {batch} |", times, "|")


if __name__ == "__main__":
  main()
