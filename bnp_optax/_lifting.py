"""The statistics of layers under the lifted transforms of `flax.linen`.

`flax.linen.scan`, `flax.linen.vmap` and `flax.linen.RNN` return only the collections that their
``variable_axes`` name. While a reporter is active, they return the intermediates as well, and what
the layers sowed takes the form that it has without the transform. `flax.linen.map_variables` gives
a layer a function of its parameter; the layouts that the layer reports are then those of the
parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import contextvars
import dataclasses
import functools
import inspect
import itertools
from typing import Any

from flax.core import lift
from flax.core.scope import Scope, in_filter
from flax.typing import Out
import jax
import jax.numpy as jnp
import numpy as np

from bnp_optax._calls import PREFIX, Call
from bnp_optax._observations import Observation
from bnp_optax._patching import Wrappers, activate
from bnp_optax._recurrence import enter_part, retrace
from bnp_optax._reporting import Reporter
from bnp_optax._trees import Path, flatten

COLLECTION = "intermediates"

# The reporter of this thread, or None.
active: contextvars.ContextVar[Any] = contextvars.ContextVar("linen", default=None)


@dataclasses.dataclass(frozen=True)
class _Lifted:
  """A scan or vmap."""

  axis: int | None  # Axis of the parameters that stacks layers; None if it repeats calls of one.
  added: bool  # Whether it returns the intermediates only for BNP.
  own: bool  # Whether its variable_axes have an axis for the intermediates.
  known: bool  # Whether the number of examples in a call within it is that of the loss.


# A function of a path under a map_variables: for each axis of the kernel, the axis of the parameter
# at the path that it is. Empty if the parameter is not mapped, None if no axis is another.
_AxesOf = Callable[[Path], tuple[int, ...] | None]

# The transform that is about to be packed, and those that enclose a layer, the innermost last.
_lifted: contextvars.ContextVar[_Lifted | None] = contextvars.ContextVar("lifted", default=None)
_outer: contextvars.ContextVar[tuple[_Lifted | _AxesOf, ...]] = contextvars.ContextVar(
  "outer", default=()
)


def _split_with_intermediates(original: Callable[..., Any]) -> Callable[..., Any]:
  """Return a function that adds the intermediates to the axes of a scan or vmap."""

  def split(xs: Mapping[Any, Any]) -> Any:
    reporter = active.get()
    axes, own = (
      [getattr(axis, "axis", axis) for name, axis in xs.items() if in_filter(name, collection)]
      for collection in ("params", COLLECTION)
    )
    # The gradient carries the statistics of a TapReporter out of a transform.
    if not isinstance(reporter, Reporter):
      if reporter is not None and any(axes):
        raise ValueError(
          f"Tapped: nn.scan or nn.vmap stacks the parameters along axis {axes[0]}, but taps need "
          "axis 0: use variable_axes={'params': 0}."
        )
      return original(xs)
    # A scan that shares its parameters does not name them here. A vmap does, and may map
    # examples: their number is then not that of the layers' inputs.
    known = not axes or axes[0] is not None or reporter.fixed_examples
    added = known and not own
    _lifted.set(_Lifted(axes[0] if axes else None, added, any(x is not None for x in own), known))
    return original({**xs, COLLECTION: Out(0)} if added else xs)

  return split


def _pack_with_statistics(original: Callable[..., Any]) -> Callable[..., Any]:
  """Return a function that packs a lifted transform and puts the statistics in order after it."""

  def pack(fn: Any, in_filters: Any, out_filters: Any, *args: Any, **kwargs: Any) -> Any:
    packed = original(fn, in_filters, out_filters, *args, **kwargs)
    reporter, lifted = active.get(), _lifted.get()
    _lifted.set(None)
    if reporter is None:
      return packed
    if kwargs.get("name") == "jit":
      return _within(packed, lambda _: retrace())
    if kwargs.get("name") == "map_variables":
      function = inspect.getclosurevars(fn).nonlocals["map_in_fn"]
      return _within(packed, lambda scopes: _enter(_axes_of(function, in_filters[0], scopes)))
    if lifted is None:
      return packed
    packed = _within(packed, lambda _: _enter(lifted))
    # The first filter that fits takes a collection, for example that of the transform's own carry.
    if not lifted.added or any(in_filter(x, COLLECTION) for x in out_filters[:-1]):
      return packed
    return _with_merged_statistics(packed, reporter, lifted.axis)

  return pack


# The wrappers of Flax's functions, which act where a reporter is active.
WRAPPERS: Wrappers = {
  (lift, "_split_in_out_axes"): _split_with_intermediates,
  (lift, "pack"): _pack_with_statistics,
}


def _with_merged_statistics(
  packed: Callable[..., Any], reporter: Reporter, axis: int | None
) -> Callable[..., Any]:
  """Return a packed transform after which statistics have the form that they have without it."""

  @functools.wraps(packed)
  def call(scope_tree: Any, *args: Any, **kwargs: Any) -> Any:
    scopes = _scopes(scope_tree)
    earlier = [dict(_sown(scope.variables().get(COLLECTION, {}))) for scope in scopes]
    outputs = packed(scope_tree, *args, **kwargs)
    for scope, old in zip(scopes, earlier, strict=True):
      for path, value in list(_sown(scope.variables().get(COLLECTION, {}))):
        if value is old.get(path):
          continue
        value = reporter.leave(value, axis)
        if path in old:
          value = reporter.merge(old[path], value)
        nested = functools.reduce(lambda inner, name: {name: inner}, path[:0:-1], value)
        scope.put_variable(COLLECTION, path[0], nested)
    return outputs

  return call


def _within(
  packed: Callable[..., Any],
  enter: Callable[[tuple[Scope, ...]], contextlib.AbstractContextManager[None]],
) -> Callable[..., Any]:
  """Return a packed transform that is called within a context made from its scopes."""

  @functools.wraps(packed)
  def call(scope_tree: Any, *args: Any, **kwargs: Any) -> Any:
    with enter(_scopes(scope_tree)):
      return packed(scope_tree, *args, **kwargs)

  return call


@contextlib.contextmanager
def _enter(transform: _Lifted | _AxesOf) -> Iterator[None]:
  """Add a transform to those that enclose a layer, within this context."""
  outer = (*_outer.get(), transform)
  shared = isinstance(transform, _Lifted) and transform.axis is None
  with activate(_outer, outer, outer), enter_part() if shared else contextlib.nullcontext():
    yield


def _axes_of(function: Callable[..., Any], mapped: Any, scopes: tuple[Scope, ...]) -> _AxesOf:
  """Return what `map_variables` with a function does to the axes of the parameter at a path."""

  def axes(path: Path) -> tuple[int, ...] | None:
    for scope in scopes:
      if in_filter(mapped, "params") and path[: len(scope.path)] == scope.path:
        variables = {k: v for k, v in scope.variables().items() if in_filter(mapped, k)}
        return _mapped_axes(function, variables, path[len(scope.path) :])
    return ()

  return axes


def leave_observation(a: Observation, axis: int | None) -> Observation:
  """Return the observation of a whole kernel, as `Reporter.leave` does."""
  length, marker = a.marker.shape[0], a.marker[0]
  if axis is None:
    calls, positions = a.calls * length, a.positions * length
    return dataclasses.replace(a, marker=marker, calls=calls, positions=positions)
  axis %= len(a.shape) + 1
  shape = (*a.shape[:axis], length, *a.shape[axis:])
  layout = a.layout if a.problem else a.layout.stacked((axis,))
  return dataclasses.replace(a, marker=marker, shape=shape, layout=layout)


def refer_to_parameter(call: Call, path: Path, biased: bool) -> Call:
  """Return a call whose layout and shape are those of the parameter, not of the mapped kernel.

  ``path`` is that of the kernel, and ``biased`` tells whether the layer has a bias.
  """
  transforms = [x for x in _outer.get() if isinstance(x, _Lifted)]
  problem = ""
  if others := [x for x in transforms if x.axis and (biased or x.own)]:
    own = ["the intermediates in variable_axes"] * any(x.own for x in others)
    problem = (
      "nn.scan or nn.vmap does not stack it along axis 0: use variable_axes={'params': 0}, or "
      f"leave out {' and '.join(['its bias'] * biased + own)}"
    )
  elif any(x.added and y.own for x, y in itertools.combinations(transforms, 2)):
    problem = (
      "of nested nn.scan or nn.vmap only the inner one has the intermediates in variable_axes: "
      "leave them out there"
    )
  elif any(x.own and not x.known for x in transforms):
    problem = "nn.vmap shares it and may map examples: pass sow_statistics(examples=...)"
  for transform in reversed(_outer.get()):
    if isinstance(transform, _Lifted):
      continue
    axes, bias_axes = transform(path), transform((*path[:-1], call.layout.bias)) if biased else ()
    kept = bias_axes is not None and bias_axes == tuple(range(len(bias_axes)))
    if axes is None or not kept or (axes and len(axes) != call.layout.ndim):
      problem = problem or (
        "nn.map_variables computes its kernel from its parameter by more than a transposition or a "
        "cast, or changes its bias. To scale a kernel, scale the inputs of the layer instead"
      )
    elif axes:
      shape = tuple(call.shape[axes.index(axis)] for axis in range(len(axes)))
      call = dataclasses.replace(call, layout=call.layout.moved(axes), shape=shape)
  return dataclasses.replace(call, problem=call.problem or problem)


def _mapped_axes(
  function: Callable[..., Any], variables: dict[str, Any], path: Path
) -> tuple[int, ...] | None:
  """Return which axis of a parameter each axis of its image is; None if they are different kernels.

  The function is applied to a parameter of the same rank whose axes have different lengths. Its
  derivative must be the transposition, so that the gradients of both are the same numbers.
  """
  leaves, treedef = jax.tree.flatten(variables)
  paths = [found for found, _ in flatten(variables)]
  if ("params", *path) not in paths:
    return None
  index = paths.index(("params", *path))
  parameter = leaves[index]
  lengths = tuple(range(2, 2 + parameter.ndim))

  def image_of(parameter: jax.Array, value: jax.Array) -> jax.Array:
    values = [jnp.full(leaf.shape, value, leaf.dtype) for leaf in leaves]
    values[index] = parameter
    return dict(flatten(function(treedef.unflatten(values))))["params", *path]

  try:
    with jax.ensure_compile_time_eval():
      probe = np.random.default_rng(0).uniform(-1, 1, lengths).astype(parameter.dtype)
      value = np.float32(3)  # Not 1: the factors of a kernel would not show.
      image = jax.eval_shape(image_of, probe, value)
      axes = tuple(lengths.index(n) for n in image.shape)
      gradient = probe.transpose(axes).astype(image.dtype)
      # Compiled, with the value as an argument: other variables may be large, and are not computed.
      gradient = jax.jit(lambda x, v, y: jax.vjp(image_of, x, v)[1](y)[0])(probe, value, gradient)
      # The gradient of a kernel that is cast is rounded.
      return axes if np.allclose(np.float32(gradient), np.float32(probe), 0.05, 0) else None
  except Exception:
    return None


def _scopes(scope_tree: Any) -> tuple[Scope, ...]:
  """Return the scopes whose variables a transform lifts."""
  return lift._dedup_scopes(jax.tree.leaves(scope_tree))[0]  # pyright: ignore[reportPrivateUsage]


def _sown(tree: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
  """Yield what layers sowed, with its path."""
  for name, value in tree.items():
    if isinstance(value, Mapping):
      yield from _sown(value, (*path, name))
    elif name.startswith(PREFIX):
      yield (*path, name), value
