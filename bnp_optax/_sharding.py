"""Arrays on a mesh with axes of the type Explicit, where JAX does not reshape split axes."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def on_auto_axes(function: Callable[..., Any], *like: jax.Array | None) -> Callable[..., Any]:
  """Return a function that is compiled as on a mesh with axes of the type Auto.

  Args:
    function: Returns a tuple of arrays, or None, with the shardings of ``like``.
    *like: Arrays, or None. If none of them is on a mesh with Explicit axes, ``function`` itself is
      returned.
  """
  shardings = tuple(None if x is None else _explicit_sharding(x) for x in like)
  if not any(shardings):
    return function
  return jax.sharding.auto_axes(function, out_sharding=shardings)


def replicated(x: jax.Array) -> jax.Array:
  """Return ``x`` on every device if it is on a mesh with Explicit axes, else ``x`` itself."""
  sharding = _explicit_sharding(x)
  if sharding is None:
    return x
  whole = NamedSharding(sharding.mesh, PartitionSpec())
  copy: Any = jax.sharding.auto_axes(lambda x: x, out_sharding=whole)
  return copy(x)


def _explicit_sharding(x: jax.Array) -> NamedSharding | None:
  sharding: Any = jax.typeof(x).sharding
  return sharding if AxisType.Explicit in sharding.mesh.axis_types else None
