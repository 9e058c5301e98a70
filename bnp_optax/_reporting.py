"""How the layers of a framework report their calls.

A `Reporter` defines what each layer sows beside its kernel. While a reporter is active in a context
variable, the framework's hooks (see `linen` and `nnx`) pass it every call of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
import dataclasses
import math
from typing import Any

import jax
from jax.core import Tracer
import jax.numpy as jnp
import numpy as np

from bnp_optax._calls import Call
from bnp_optax._recurrence import is_part, leading_of_sequences, mask_of_step
from bnp_optax._statistics import (
  AxisName,
  LayerStatistics,
  Mask,
  NoStatistics,
  layer_statistics,
  leave_transform,
  merge_two_calls,
)
from bnp_optax._trees import Path, has_prefix, show_path

# Functions of a layer and the inputs of a call.
Exclude = Callable[[Any, jax.Array], bool]
MaskFn = Callable[[Any, jax.Array], Mask]


@dataclasses.dataclass(frozen=True)
class Reporter:
  """What the layers of a model sow for each call, and how the values of several calls merge."""

  record: Callable[[Any, Call], Any]  # Maps a module and its call to the value to sow, or None.
  merge: Callable[[Any, Any], Any]
  exact_windows: bool
  # Functions traced under an equal key are reused. The default is equal to no other.
  key: Hashable = dataclasses.field(default_factory=object)
  # Maps a value that a transform stacked along axis 0, and the axis along which it stacked the
  # kernels, or None if it called one layer repeatedly, to the value for the whole kernel.
  leave: Callable[[Any, int | None], Any] = lambda value, axis: value
  fixed_examples: bool = True  # Whether a mapped axis does not change the number of examples.
  covers_nested: bool = False  # Whether it reports calls within contexts that the model enters.
  needs_windows: bool = False  # Whether `exact_windows` is also that of those contexts.

  def nested(self, inner: Any) -> Reporter:
    """Return the reporter of a context of ``inner`` that is entered within one of this reporter."""
    if not self.covers_nested:
      return inner
    exact_windows = self.needs_windows or inner.exact_windows
    return dataclasses.replace(self, exact_windows=exact_windows, key=(self.key, inner.key))

  def report(self, module: Any, collection: Any, call: Call, outputs: Any) -> Any:
    """Sow the record of a call beside its kernel, merged with earlier ones; return the outputs."""
    value = self.record(module, call)
    if value is not None:
      module.sow(
        collection,
        call.statistics_name,
        value,
        init_fn=lambda: None,
        reduce_fn=lambda old, new: new if old is None else self.merge(old, new),
      )
    return outputs


class Masks:
  """The mask of each call: one for all, that of the longest prefix of a path, or a function's."""

  def __init__(self, mask: Mask | Mapping[str, Mask] | MaskFn) -> None:
    """Keep the masks by prefix, or the function."""
    self._choose = mask if callable(mask) else None
    self._masks = mask if isinstance(mask, Mapping) else {"": None if callable(mask) else mask}
    self._unused = {prefix for prefix in self._masks if prefix}
    # A function that was traced under an equal key would keep its masks, and skip check_prefixes.
    unique = isinstance(mask, Mapping) or callable(mask)
    self.key: Hashable = object() if unique else _array_key(self._masks[""])

  def of_call(self, layer: Any, call: Call, path: Path) -> Mask:
    """Return the mask of a call of the layer at a path; None if it has none."""
    if self._choose is not None:
      return self._choose(layer, call.inputs)
    prefixes = [prefix for prefix in self._masks if has_prefix((*path, call.kernel), prefix)]
    self._unused.difference_update(prefixes)
    return self._masks[max(prefixes, key=len)] if prefixes else None

  def check_prefixes(self) -> None:
    """Raise ValueError if no layer that was called has a path with one of the prefixes."""
    if self._unused:
      raise ValueError(
        f"mask= has prefixes of no layer that was called: {', '.join(sorted(self._unused))}. A "
        "prefix is the start of a layer's path in the table of bnp_optax.linen.layers(model, "
        "*inputs)."
      )


def eval_shape(function: Callable[..., Any], axis_name: AxisName | None, *args: Any) -> Any:
  """Trace a function under mapped axes of size 1, unbatched; return the shapes of its outputs."""
  for name in (axis_name,) if isinstance(axis_name, str) else axis_name or ():
    function = jax.vmap(function, in_axes=None, out_axes=None, axis_name=name, axis_size=1)
  try:
    return jax.eval_shape(function, *args)
  except NameError as error:
    if "axis name" in str(error):
      error.add_note("Pass the name of the mapped axis, as in layers(..., axis_name='batch').")
    raise


def statistics_reporter(
  locate: Callable[[Any, Call], Path],
  examples: int | jax.Array | None,
  example_axes: int,
  masks: Masks,
  axis_name: AxisName | None,
  exact_windows: bool,
  exclude: Exclude | None = None,
) -> Reporter:
  """Return the reporter of `LayerStatistics`. The arguments are those of `sow_statistics`.

  ``locate`` returns the path of the layer of a call, for its mask and for errors.
  """
  check_examples(examples, example_axes)
  counted: dict[tuple[int, int], tuple[str, Mask]] = {}

  def record(module: Any, call: Call) -> LayerStatistics | NoStatistics | None:
    if exclude is not None and exclude(module, call.inputs):
      return None
    path = locate(module, call)
    name, given = show_path(path), masks.of_call(module, call, path)
    mask = None if given is None else jnp.asarray(given).astype(bool)
    statistics = call_statistics(call, name, examples, example_axes, mask, axis_name)
    if examples is None and isinstance(statistics, LayerStatistics):
      # A mask of whole examples changes their number, which is unknown while tracing.
      of_examples = None if mask is None or mask.ndim > example_axes else given
      count = math.prod(call.example_shape(example_axes))
      counted.setdefault((count, id(of_examples)), (name, of_examples))
      if len(counted) > 1:
        layers = " and ".join(
          f"{n} {'' if x is None else 'before its mask '}in layer {name}"
          for (n, _), (name, x) in counted.items()
        )
        part = "" if axis_name is None else f", counted in one part along {axis_name!r} alone,"
        raise ValueError(
          f"The layers disagree about the number of examples: {layers}. Pass the number that the "
          f"loss divides by{part} as sow_statistics(examples=...). Call a model whose statistics "
          "are not passed to update, such as a target network, outside of the context."
        )
    return statistics

  key = (_array_key(examples), masks.key, example_axes, axis_name, exact_windows, exclude)
  fixed = examples is not None
  return Reporter(record, merge_two_calls, exact_windows, key, leave_transform, fixed)


def check_examples(examples: int | jax.Array | None, example_axes: int) -> None:
  """Raise ValueError if a number of examples or of their axes is out of range."""
  known = isinstance(examples, int | float | np.number)
  valid = examples > 0 if known else examples is None or hasattr(examples, "dtype")
  if not valid or np.ndim(examples) or example_axes < 0:  # pyright: ignore[reportArgumentType]
    raise ValueError(
      "examples= must be a number above 0 and example_axes= at least 0, got "
      f"{examples!r} and {example_axes}."
    )


def _array_key(x: jax.typing.ArrayLike | None) -> Hashable:
  """Return a hashable cache key for an array, which is a constant of what is traced under it."""
  if x is None:
    return None
  return object() if isinstance(x, Tracer) else (np.shape(x), np.asarray(x).tobytes())


def call_statistics(
  call: Call,
  name: str,
  examples: int | jax.Array | None,
  example_axes: int,
  mask: jax.Array | None,
  axis_name: AxisName | None,
) -> LayerStatistics | NoStatistics:
  """Compute the statistics of one call of the layer called ``name``."""
  if call.problem:
    return NoStatistics(call.kernel, call.problem)
  inputs, leading = call.inputs, leading_of_sequences(call.leading) or call.leading
  example_shape = call.example_shape(example_axes)
  if inputs.size == 0:
    raise ValueError(
      f"Layer {name}: no rows in its inputs of shape {inputs.shape}: empty batch, or no features?"
    )
  count = math.prod(example_shape)
  if mask is not None:
    mask = _fit_mask(mask, name, call)
    if examples is None:
      # An example counts if any of its positions does.
      counts = jnp.any(mask, tuple(range(len(example_shape), mask.ndim)))
      count = count // counts.size * jnp.sum(counts)
    mask = jnp.broadcast_to(jnp.expand_dims(mask, range(mask.ndim, len(leading))), leading)
    mask = mask_of_step(mask)
  statistics = layer_statistics(
    inputs,
    examples=count if examples is None else examples,
    rows=math.prod(call.leading) if call.rows is None else call.rows,
    mask=mask,
    stack=call.stack,
    axis_name=axis_name,
    kernel=call.kernel,
  )
  return dataclasses.replace(statistics, layout=call.layout)


def _fit_mask(mask: jax.Array, name: str, call: Call) -> jax.Array:
  """Return a mask without the axes that a layer's inputs lack: a position counts if any does."""
  leading, shape = leading_of_sequences(call.leading), call.inputs.shape
  own = (
    'Give the layer its own mask: in Linen by the prefix of its path, as in mask={"encoder": mask, '
    '"": None}, in NNX by a function, as in mask=lambda layer, x: mask if layer is model.encoder '
    "else None."
  )
  if leading is None:
    raise ValueError(
      f"Layer {name}: its inputs of shape {shape} do not begin with the batch of the recurrent "
      f"layer around it, so its part of the mask of shape {mask.shape} is unknown. {own}"
    )
  if is_part() and mask.ndim > len(leading):
    raise ValueError(
      f"Layer {name}: the mask of shape {mask.shape} has more axes than its inputs of shape "
      f"{shape}, and nn.scan or nn.vmap may pass it a part of the batch in each call. {own}"
    )
  common = min(mask.ndim, len(leading))
  if mask.shape[:common] != leading[:common]:
    exact = " windows, those of exact_windows=True," if call.layout.exact_windows else " inputs"
    steps = f" in one step, of leading shape {leading} in all" if leading != call.leading else ""
    raise ValueError(
      f"Layer {name}: the mask of shape {mask.shape} does not fit its{exact} of shape {shape}"
      f"{steps}. It must be their leading shape, or begin with it. {own}"
    )
  return jnp.any(mask, tuple(range(common, mask.ndim)))
