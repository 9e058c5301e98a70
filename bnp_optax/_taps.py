r"""Taps: statistics that reach the optimizer with the gradient.

A tap is a tree of zeros beside a kernel, in the parameters. No layer uses its value. Its gradient
is defined to be the statistics of the layer's inputs: `tap_outputs` is the identity on the outputs
of a layer, and its backward pass returns the statistics as the cotangent of the tap.

Whatever adds gradients adds statistics: scan, vmap, several calls, micro-batches. Whatever averages
or scales gradients multiplies all statistics by one factor :math:`c`. The tap of a layer therefore
carries the share of the loss's examples that a call of the model has. Over all calls the shares
add up to :math:`c`, by which the statistics are divided.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnp_optax._calls import Call
from bnp_optax._layout import KernelLayout
from bnp_optax._recurrence import time_on_first_axis
from bnp_optax._reporting import call_statistics, check_examples
from bnp_optax._sharding import replicated
from bnp_optax._statistics import LayerStatistics, NoStatistics
from bnp_optax._trees import by_kernel, is_array, is_masked, name_path

_SUMS = ("rows", "total", "within", "between")
_FIELDS = {"examples", "share", *_SUMS}
# The statistics must not count in a global norm of the gradients, nor underflow in float32 after
# division by a loss scale. A power of two is exact.
_SCALE = 2.0**-60
# Ends the name of the tap of a kernel whose axes are not those of Dense or Conv.
_OTHER_AXES = "_needs_layers"


def is_tap(x: Any) -> bool:
  """Return True for a tap."""
  return isinstance(x, Mapping) and set(x) == _FIELDS


def map_taps(function: Callable[[Any], Any], tree: Any) -> Any:
  """Apply a function to every tap of a tree; other leaves stay."""
  return jax.tree.map(lambda x: function(x) if is_tap(x) else x, tree, is_leaf=is_tap)


def name_tap(call: Call) -> str:
  """Return the name of the tap beside the kernel of a call."""
  # It must not contain "kernel", by which WeightNorm chooses what it normalizes.
  name = "tap" if call.kernel == "kernel" else f"tap_{call.kernel}"
  plain = call.layout == KernelLayout.by_convention(call.layout.ndim)
  return name if plain else name + _OTHER_AXES


def zero_taps(updates: Any) -> Any:
  """Return updates that leave the taps at zero."""
  return map_taps(lambda tap: jax.tree.map(jnp.zeros_like, tap), updates)


def remove_taps(params: Any) -> Any:
  """Return parameters without the taps that `Tapped` added.

  Examples:
    >>> import bnp_optax, flax.linen as nn, jax, jax.numpy as jnp
    >>> params = bnp_optax.linen.Tapped(nn.Dense(3), examples=4).init(
    ...   jax.random.key(0), jnp.ones((4, 2)))["params"]
    >>> sorted(params), sorted(bnp_optax.linen.remove_taps(params))
    (['bias', 'kernel', 'tap'], ['bias', 'kernel'])

  Args:
    params: Parameters, nested mappings such as Flax's.

  Returns:
    Mappings of the same types.
  """
  if not isinstance(params, Mapping):
    return params
  kept = {name: remove_taps(x) for name, x in params.items() if not is_tap(x)}
  return type(params)(kept)  # pyright: ignore[reportCallIssue]


def read_taps(updates: Any, *, has_layers: bool) -> Any:
  """Return the statistics in the gradients of taps, beside the kernels; None without taps.

  The gradients are without boxes. ``has_layers`` tells whether the layouts of the kernels are from
  the table of the model.
  """

  def read(path: tuple[Any, ...], tap: Any) -> LayerStatistics | NoStatistics | None:
    if not is_tap(tap) or any(is_masked(x) for x in tap.values()):
      return None
    name = name_path(path)[-1]
    kernel = name.removesuffix(_OTHER_AXES).removeprefix("tap").removeprefix("_") or "kernel"
    if name.endswith(_OTHER_AXES) and not has_layers:
      reason = "its kernel has other axes than that of a Dense or Conv, pass layers= of the model"
      return NoStatistics(kernel, reason)
    if (dtype := tap["rows"].dtype) not in ("float32", "float64"):
      return NoStatistics(kernel, f"its tap was cast to {dtype}: keep the gradients in float32")
    # A layer whose outputs did not reach the loss has no share, and no rows. Under a loss scale
    # above 2**50 the share is so small that sums underflow: it has no rows either.
    tiny = jnp.abs(tap["share"]) < 2**16 * jnp.finfo(dtype).smallest_normal
    share = jnp.where(tiny, jnp.inf, tap["share"])
    counts = {name: tap[name] / share for name in ("examples", "rows")}
    sums = {name: tap[name] / share[..., None] for name in _SUMS[1:]}
    return LayerStatistics(**counts, **sums, kernel=kernel)

  stats = jax.tree_util.tree_map_with_path(read, updates, is_leaf=is_tap)
  return stats if by_kernel(stats, LayerStatistics, NoStatistics) else None


def check_settings(examples: int, example_axes: int) -> None:
  """Raise ValueError if `Tapped` cannot count examples with these arguments."""
  # The share of a call is a constant of its backward pass.
  if not isinstance(examples, int | float | np.number):
    raise ValueError(
      "Tapped needs examples= as a number, that of the examples of one update, got "
      f"{type(examples).__name__}."
    )
  check_examples(examples, example_axes)


def count_examples(
  tapped: Any, params: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Any, tuple[int, bool]]:
  """Return parameters whose taps count the examples of one call of a `Tapped` model.

  Also return their number, and whether the arguments disagree about it. Raise ValueError if no
  argument has the example axes, or there is no ``batch_argument``.
  """
  example_axes, batch_argument = tapped.example_axes, tapped.batch_argument
  named = dict(enumerate(args)) | dict(kwargs)
  if batch_argument is not None and batch_argument not in named:
    raise ValueError(
      f"Tapped: the model is called without the argument {batch_argument!r} that batch_argument= "
      f"refers to. The arguments are {[*named]}."
    )
  arguments = named.values() if batch_argument is None else (named[batch_argument],)
  leaves = [
    x for x in jax.tree.leaves([*arguments]) if is_array(x) and len(x.shape) >= example_axes
  ]
  # Not a random key, which has a dtype of its own.
  arrays = [x for x in leaves if not jnp.issubdtype(x.dtype, jax.dtypes.extended)]
  if not arrays:
    raise ValueError(
      f"Tapped: no argument has {example_axes} leading axes that count examples. Call the model on "
      "a batch, or pass example_axes=0 if jax.vmap maps single examples."
    )
  counts = [math.prod(jnp.shape(x)[:example_axes]) for x in arrays]
  count = counts[0]

  def count_call(tap: Any) -> Any:
    counted = _follow({name: tap[name] for name in ("examples", "share")}, *arrays)
    return _count(count, count / tapped.examples, {**tap, **counted})

  unclear = batch_argument is None and len(set(counts)) > 1
  return map_taps(count_call, params), (count, unclear)


def _follow(tree: Any, *references: jax.Array) -> Any:
  """Return a tree, mapped over every axis that one of ``references`` is mapped over.

  Without it, vmap calls the backward pass once for all examples if the tree does not depend on
  them, and shard_map requires equal cotangents on all devices.
  """

  def first_corner(x: jax.Array) -> jax.Array:
    return jnp.any(x[(slice(1),) * x.ndim].astype(bool))

  corners = [replicated(jnp.asarray(x), first_corner) for x in references]
  either = functools.reduce(jnp.logical_or, corners)
  return jax.tree.map(lambda x: jnp.where(either, x, x), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _count(count: int, share: float, tap: Any) -> Any:
  """Return a tap whose cotangent gains the count of examples and their share."""
  del count, share
  return tap


def _count_forward(count: int, share: float, tap: Any) -> tuple[Any, None]:
  # Not the tap alone: where a derivative is differentiated, the outer rule is that of this call.
  return _count(count, share, tap), None


def _count_backward(count: int, share: float, residuals: None, cotangent: Any) -> tuple[Any]:
  del residuals
  # A sum with the cotangent, which is zero here, is mapped as the cotangent is.
  counted = {"examples": cotangent["examples"] + count, "share": cotangent["share"] + share}
  return (jax.tree.map(lambda x: x * _SCALE, {**cotangent, **counted}),)


_count.defvjp(_count_forward, _count_backward)


@jax.custom_vjp
def _identity(outputs: Any, tap: Any, sums: Any) -> Any:
  """Return the outputs. The cotangent of the tap is ``sums``."""
  del tap, sums
  return outputs


def _identity_forward(outputs: Any, tap: Any, sums: Any) -> tuple[Any, Any]:
  return _identity(outputs, tap, sums), sums


def _identity_backward(sums: Any, cotangent: Any) -> tuple[Any, Any, None]:
  return cotangent, sums, None


_identity.defvjp(_identity_forward, _identity_backward)


@dataclasses.dataclass(frozen=True)
class TapReporter:
  """Connects the calls of linear layers to their taps.

  It shares `report` and `key` with `Reporter`. ``find_tap`` returns the tap of the kernel of a
  module's call, given a function that makes it; None if the module has none.
  """

  find_tap: Callable[[Any, Call, Callable[[], Any]], Any]
  describe: Callable[[Any, Call], str]  # Returns the name of the layer of a call in errors.
  exact_windows: bool
  example_axes: int = 1
  # Number of examples of the arguments, and whether all layers must have the same.
  counts: tuple[int, bool] = (0, False)
  _found: dict[int, str] = dataclasses.field(default_factory=dict, compare=False)
  _unique: object = dataclasses.field(default_factory=object, compare=False)

  @property
  def key(self) -> Hashable:
    """Functions traced under an equal key are reused."""
    # A function that was traced under an equal key would not report its calls to check.
    return (self.find_tap, self.exact_windows, self.counts[1] and self._unique)

  def check(self) -> None:
    """Raise ValueError if a layer was called with another number of examples."""
    count, checked = self.counts
    if checked and {*self._found} - {count}:
      found = " and ".join(f"{n} in layer {name}" for n, name in self._found.items())
      raise ValueError(
        f"Tapped counts {count} examples along the first array among the arguments, but "
        f"other arrays and the layers have other numbers: there are {found}. Pass batch_argument=, "
        "the position or the name of the argument that has the batch."
      )

  def report(self, module: Any, collection: Any, call: Call, outputs: Any) -> Any:
    """Return the outputs of a call, connected to the tap of its kernel."""
    del collection
    name = self.describe(module, call)
    statistics = call_statistics(call, name, 1, 1, None, None)
    if isinstance(statistics, NoStatistics):
      return outputs
    count = math.prod(call.example_shape(self.example_axes))
    self._found.setdefault(count, name)
    if (time := time_on_first_axis()) and self.counts[0] == time != count:
      raise ValueError(
        f"Layer {name}: Tapped counts the {time} time steps as examples, because the time is the "
        "first axis. Pass example_axes=2 if the loss is a mean over all time steps, or else give "
        "the model inputs [batch, time, features]."
      )
    if outputs is None:
      raise ValueError(
        f"Layer {name}: report() does not return the outputs, which a tap needs. Register the "
        "module's class with bnp_optax.linen.register or bnp_optax.nnx.register instead."
      )
    rows = _follow(statistics.rows, statistics.total)
    sums = {"examples": jnp.zeros_like(rows), "share": jnp.zeros_like(rows), "rows": rows}
    sums |= {name: getattr(statistics, name) for name in _SUMS[1:]}
    tap = self.find_tap(module, call, lambda: jax.tree.map(jnp.zeros_like, sums))
    if tap is None:
      return outputs
    if (dtype := tap["rows"].dtype) not in ("float32", "float64"):
      raise ValueError(
        f"Layer {name}: its tap is {dtype}. The statistics need float32: pass dtype={dtype} to the "
        "layers instead of a cast of their parameters."
      )
    sums = jax.tree.map(lambda x: replicated(x).astype(dtype), sums)
    return _identity(outputs, _follow(dict(tap), statistics.total), sums)
