"""Arrays on a mesh with axes of the type Explicit, where JAX does not reshape split axes."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def on_auto_axes(function: Callable[..., Any], *like: jax.Array | None) -> Callable[..., Any]:
  """Return a function that is compiled as on a mesh with axes of the type Auto.

  It returns a tuple of arrays, or None, with the shardings of ``like``. If none of those is on a
  mesh with Explicit axes, it is ``function`` itself.
  """
  shardings = tuple(None if x is None else _explicit_sharding(x) for x in like)
  mesh = next((sharding.mesh for sharding in shardings if sharding), None)
  return function if mesh is None else _auto_axes(function, mesh, shardings)


def replicated(x: jax.Array, function: Callable[[jax.Array], jax.Array] = lambda x: x) -> jax.Array:
  """Return ``function(x)``, on every device if ``x`` is on a mesh with Explicit axes."""
  sharding = _explicit_sharding(x)
  if sharding is None:
    return function(x)
  return _auto_axes(function, sharding.mesh, NamedSharding(sharding.mesh, PartitionSpec()))(x)


def _auto_axes(function: Callable[..., Any], mesh: Any, out_sharding: Any) -> Callable[..., Any]:
  # Within shard_map over some of the axes, those are Manual and stay so.
  explicit = (mesh.axis_names[i] for i, t in enumerate(mesh.axis_types) if t == AxisType.Explicit)
  return jax.sharding.auto_axes(function, axes=tuple(explicit), out_sharding=out_sharding)


def _explicit_sharding(x: jax.Array) -> NamedSharding | None:
  sharding: Any = jax.typeof(x).sharding
  return sharding if AxisType.Explicit in sharding.mesh.axis_types else None
