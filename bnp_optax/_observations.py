"""Observations of the layers of a model that is traced, and the table that they make.

A framework traces its model with `jax.eval_shape` and sows an `Observation` beside each linear
layer, as it sows statistics in training. An observation that comes out stacked was scanned or
mapped.
"""

from collections.abc import Collection, Mapping
import dataclasses
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bnp_optax._calls import Call
from bnp_optax._layers import LayerEntry, Layers, Shape
from bnp_optax._layout import KernelLayout
from bnp_optax._statistics import TWO_MEANINGS
from bnp_optax._trees import Path, by_kernel, flatten, has_prefix


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Observation:
  """A description of one layer, sown while the model is traced.

  Only the marker is a leaf: a scalar where it is sown, which scan and vmap stack as they stack
  statistics. ``shape`` and ``layout`` are those of the kernel inside the layer. The other fields
  are as in `LayerEntry` and `Call`.
  """

  marker: jax.Array
  kind: str = dataclasses.field(metadata={"static": True})
  kernel: str = dataclasses.field(metadata={"static": True})
  shape: Shape = dataclasses.field(metadata={"static": True})
  inputs: Shape = dataclasses.field(metadata={"static": True})
  calls: int = dataclasses.field(metadata={"static": True})
  positions: int = dataclasses.field(metadata={"static": True})
  layout: KernelLayout = dataclasses.field(metadata={"static": True})
  problem: str = dataclasses.field(metadata={"static": True})


def observe_call(module: Any, call: Call) -> Observation:
  """Return the observation of one call of a layer."""
  # Not max(): a symbolic size cannot be compared with 1.
  examples = math.prod(call.leading[: int(call.batched)]) or 1
  rows = math.prod(call.leading) if call.rows is None else call.rows
  return Observation(
    marker=jnp.zeros(()),
    kind=type(module).__name__,
    kernel=call.kernel,
    shape=call.shape,
    inputs=call.inputs.shape,
    calls=1,
    positions=rows // examples,
    layout=call.layout,
    problem=call.problem,
  )


def merge_observed(a: Observation, b: Observation) -> Observation:
  """Merge the observations of two calls of a layer."""
  problem = a.problem or b.problem
  if (a.shape, a.layout) != (b.shape, b.layout):
    problem = problem or TWO_MEANINGS
  calls, positions = a.calls + b.calls, a.positions + b.positions
  return dataclasses.replace(a, calls=calls, positions=positions, problem=problem)


class Owner(NamedTuple):
  """The module that a parameter belongs to."""

  kind: str  # Class of the module.
  ndim: int  # Number of axes of the parameter inside the module.
  linear: bool  # Whether the parameter may be the kernel of a linear layer.

  @classmethod
  def of(cls, module: Any, name: str, ndim: int, others: Mapping[str, Any]) -> "Owner":
    """Return the owner of a module's parameter; ``others`` is `_OTHERS` of the framework."""
    # nn.WeightNorm names its parameters after the kernels that it scales.
    other = isinstance(module, others.get(name.rpartition("/")[-1], ()))
    return cls(type(module).__name__, ndim, not other)


def make_layers(
  params: Any,
  observations: Any,
  called: Mapping[Path, str],
  owners: Mapping[Path, Owner],
  strict: bool,
  ignore: Collection[str],
) -> Layers:
  """Make the table of a model from its parameters and the tree of its observations.

  By path, ``called`` has the class of every linear layer that was called, also if its observation
  was lost, and ``owners`` the owners that are known. ``strict`` and ``ignore`` are those of
  `bnp_optax.linen.layers`.
  """
  shapes = {path: tuple(x.shape) for path, x in flatten(params)}
  for prefix in ignore:
    if not any(has_prefix(path, prefix) for path in shapes):
      raise ValueError(f"ignore= has a prefix of no parameter of the model: {prefix!r}.")
  observed: dict[Path, Observation] = by_kernel(observations, Observation)
  for path, x in flatten(params):
    if path in observed and not jnp.issubdtype(x.dtype, jnp.floating):
      problem = observed[path].problem or f"BNP is defined for real kernels, found {x.dtype}"
      observed[path] = dataclasses.replace(observed[path], problem=problem)
  beside = {(*path[:-1], x.layout.bias) for path, x in observed.items()}
  beside |= {(*path[:-1], "bias") for path in called}
  biases, entries = set(), {}

  def passed_by(path: Path, kind: str, reason: str = "", covered: bool | None = True) -> LayerEntry:
    shape, note = shapes[path], reason or "passes through"
    return LayerEntry(path, kind, shape, None, None, None, None, math.prod(shape), note, covered)

  for path, shape in shapes.items():
    owner = owners.get(path, Owner("", len(shape), linear=True))
    if path in observed:
      entries[path], bias = _entry(path, shape, observed[path], shapes)
      biases.add(bias)
    elif path in called:
      reason = "its statistics do not leave the lifted transform around it, such as nn.while_loop"
      entries[path] = passed_by(path, called[path], reason, covered=False)
    elif owner.linear and owner.ndim >= 2 and path not in beside:
      reason = "no linear layer was called with it: a class that is not registered, or no call"
      entries[path] = passed_by(path, owner.kind, reason, covered=None)
    else:
      entries[path] = passed_by(path, owner.kind)
  for path, x in observed.items():
    if path not in shapes:
      note = "its kernel is shared with another module, so its statistics would be lost"
      found = (x.kind, x.shape, x.inputs, x.calls, x.positions)
      entries[path] = LayerEntry(path, *found, None, 0, note, covered=False)
  for path, entry in entries.items():
    if not entry.covered and any(has_prefix(path, prefix) for prefix in ignore):
      entries[path] = dataclasses.replace(entry, note="passes through", covered=True)
  layers = Layers(tuple(entry for path, entry in entries.items() if path not in biases))
  if strict and (missing := [entry for entry in layers.entries if not entry.covered]):
    raise ValueError(
      "BNP cannot precondition these parameters:\n"
      + "\n".join(f"  {'/'.join(entry.path)}: {entry.note}." for entry in missing)
      + "\nName in ignore= those that are to train without BNP. Without strict=True, their "
      "gradients pass through unchanged."
    )
  return layers


def _entry(
  path: Path, shape: Shape, observed: Observation, params: Mapping[Path, Shape]
) -> tuple[LayerEntry, Path | None]:
  """Return the entry of one kernel, and the path of the bias that it covers, if any."""
  calls, positions = observed.calls, observed.positions
  problem, layout = observed.problem, None
  bias = (*path[:-1], observed.layout.bias)
  if not problem:
    found = _stack_axes(shape, observed.shape, observed.marker.shape)
    if found is None:
      problem = (
        f"the parameter of shape {shape} reaches the layer as {observed.shape}, stacked as "
        f"{observed.marker.shape}, so the axes cannot be matched"
      )
    else:
      stack, repeated = found
      repetitions = math.prod(observed.marker.shape[axis] for axis in repeated)
      calls, positions = calls * repetitions, positions * repetitions
      layout = dataclasses.replace(observed.layout.stacked(stack), calls=repeated)
      expected = layout.bias_shape(shape)
      if bias in params and params[bias] != expected:
        problem = (
          f"its bias has shape {params[bias]} instead of {expected}; if it is stacked by nn.scan "
          'or nn.vmap, use variable_axes={"params": 0}'
        )
  size, covered_bias = math.prod(shape), None
  if problem:
    layout, note = None, problem
  elif bias not in params:
    note = "yes, without bias: not centred"
  else:
    size, covered_bias, note = size + math.prod(params[bias]), bias, "yes"
  entry = LayerEntry(
    *(path, observed.kind, shape, observed.inputs, calls, positions, layout, size, note),
    covered=not problem,
  )
  return entry, covered_bias


def _stack_axes(shape: Shape, inner: Shape, outer: Shape) -> tuple[Shape, Shape] | None:
  """Match the axes that scan and vmap add to a kernel and to the marker.

  From the shape of the parameter, its shape inside the layer, and the axes that the marker gained
  on its way out, return the stack axes of the kernel and the axes of the marker that are repeated
  calls, the outermost first. Where the shapes leave a choice, the stack leads the kernel, as it
  does by default for every scan and vmap. None if calls cannot be separated from the stack.
  """
  count = len(shape) - len(inner)
  if count < 0:
    return None
  for axes in itertools.permutations(range(len(shape)), count):
    if tuple(size for axis, size in enumerate(shape) if axis not in axes) != inner:
      continue
    fits = [
      places
      for places in itertools.combinations(range(len(outer)), count)
      if all(outer[p] == shape[a] for p, a in zip(places, axes, strict=True))
    ]
    if fits:
      calls = tuple(axis for axis in range(len(outer)) if axis not in fits[0])
      return (axes, calls) if len(fits) == 1 else None
  return None
