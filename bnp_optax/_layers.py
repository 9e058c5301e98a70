"""`Layers`: the table of a model's parameters, which lists those that BNP preconditions.

A framework traces its model with `jax.eval_shape` and sows an `Observation` beside each linear
layer, as it sows statistics in training. An observation that comes out stacked was scanned or
mapped.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

from bnp_optax._calls import Call
from bnp_optax._layout import KernelLayout
from bnp_optax._statistics import TWO_MEANINGS
from bnp_optax._trees import Path, by_kernel, flatten

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class LayerEntry:
  """One entry of the table: a linear layer, or a parameter that belongs to none.

  Attributes:
    path: Path of the kernel, or of the parameter.
    kind: Class of the layer, or empty.
    shape: Shape of the kernel, or of the parameter.
    inputs: Shape of the inputs of one call; None if unknown.
    positions: Number of output positions of an example, over all calls; None if unknown.
    layout: Layout of the kernel; None if BNP does not precondition it.
    size: Number of parameters, including those of the bias.
    note: How BNP treats it, or why BNP does not.
    covered: False for a linear layer that BNP cannot precondition.
  """

  path: Path
  kind: str
  shape: Shape
  inputs: Shape | None
  positions: int | None
  layout: KernelLayout | None
  size: int
  note: str
  covered: bool = True


@dataclasses.dataclass(frozen=True)
class Layers(Mapping[Path, KernelLayout]):
  """The layers of a model, as `bnp_optax.linen.layers` or `bnp_optax.nnx.layers` finds them.

  An immutable, hashable mapping from the path of each kernel that BNP preconditions to its layout,
  for the argument ``layers`` of the transformations. Printed, it is a table of all parameters.

  Examples:
    >>> import bnp_optax, flax.linen as nn, jax
    >>> layers = bnp_optax.linen.layers(nn.Dense(3), jax.ShapeDtypeStruct((4, 2), "float32"))
    >>> isinstance(layers, bnp_optax.Layers), list(layers)
    (True, [('kernel',)])

  Attributes:
    entries: The entries of the table.
  """

  entries: tuple[LayerEntry, ...]

  @functools.cached_property
  def _layouts(self) -> dict[Path, KernelLayout]:
    return {entry.path: entry.layout for entry in self.entries if entry.layout is not None}

  def __getitem__(self, path: Path) -> KernelLayout:
    """Return the layout of the kernel at a path."""
    return self._layouts[path]

  def __iter__(self) -> Iterator[Path]:
    """Iterate over the paths of the kernels."""
    return iter(self._layouts)

  def __len__(self) -> int:
    """Return the number of kernels."""
    return len(self._layouts)

  def __str__(self) -> str:
    """Return the table as plain text."""
    lines = [("path", "kind", "shape", "inputs", "positions", "preconditioned")]
    lines += [
      (
        "/".join(entry.path),
        entry.kind,
        _show(entry.shape),
        "" if entry.inputs is None else _show(entry.inputs),
        "" if entry.positions is None else str(entry.positions),
        entry.note if entry.covered else f"NO: {entry.note}",
      )
      for entry in self.entries
    ]
    preconditioned = sum(entry.size for entry in self.entries if entry.layout is not None)
    total = sum(entry.size for entry in self.entries)
    table = plain_table(lines, right={"positions"})
    return f"{table}\n{len(self)} layers, {preconditioned:,} of {total:,} parameters"

  __repr__ = __str__


def _show(shape: Shape) -> str:
  return "x".join(map(str, shape)) or "scalar"


def plain_table(lines: Sequence[Sequence[str]], right: Collection[str]) -> str:
  """Format a table as plain text.

  >>> print(plain_table([("layer", "kappa"), ("conv", "3.1"), ("dense1", "12")], right={"kappa"}))
  layer   kappa
  -------------
  conv      3.1
  dense1     12

  Args:
    lines: Lines of equal length, the headings first.
    right: Headings of the columns that are aligned to the right.
  """
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  align = [str.rjust if heading in right else str.ljust for heading in lines[0]]
  table = [
    "  ".join(a(x, w) for a, x, w in zip(align, line, widths, strict=True)).rstrip()
    for line in lines
  ]
  return "\n".join([table[0], "-" * max(map(len, table)), *table[1:]])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Observation:
  """A description of one layer, sown while the model is traced. Only the marker is a leaf.

  Attributes:
    marker: A scalar where it is sown. Scan and vmap stack it as they stack statistics.
    kind: Class of the layer.
    kernel: Name of the kernel leaf.
    shape: Shape of the kernel inside the layer.
    inputs: Shape of the inputs.
    positions: Number of output positions of an example, over all calls.
    layout: Layout of the kernel inside the layer.
    problem: Why BNP is not defined for it, or empty.
  """

  marker: jax.Array
  kind: str = dataclasses.field(metadata={"static": True})
  kernel: str = dataclasses.field(metadata={"static": True})
  shape: Shape = dataclasses.field(metadata={"static": True})
  inputs: Shape = dataclasses.field(metadata={"static": True})
  positions: int = dataclasses.field(metadata={"static": True})
  layout: KernelLayout = dataclasses.field(metadata={"static": True})
  problem: str = dataclasses.field(metadata={"static": True})


def observe_call(call: Call, kind: str, example_axes: int = 1) -> Observation:
  """Return the observation of one call of a layer."""
  examples = max(1, math.prod(call.example_shape(example_axes)))
  rows = math.prod(call.leading) if call.rows is None else call.rows
  return Observation(
    marker=jnp.zeros(()),
    kind=kind,
    kernel=call.kernel,
    shape=call.shape,
    inputs=call.inputs.shape,
    positions=rows // examples,
    layout=call.layout,
    problem=call.problem,
  )


def merge_observations(a: Observation, b: Observation) -> Observation:
  """Merge the observations of two calls of a layer."""
  problem = a.problem or b.problem
  if (a.shape, a.layout) != (b.shape, b.layout):
    problem = problem or TWO_MEANINGS
  return dataclasses.replace(a, positions=a.positions + b.positions, problem=problem)


def make_layers(
  params: Any, observations: Any, called: Mapping[Path, str], lost: str, strict: bool
) -> Layers:
  """Make the table of a model.

  Args:
    params: The parameters, or their shapes.
    observations: A tree in which each `Observation` lies beside its kernel.
    called: Class of every linear layer that was called, by the path of its kernel, including those
      whose observation was lost.
    lost: Why an observation may have been lost, and how to prevent it.
    strict: Whether to raise if a linear layer is not covered.

  Raises:
    ValueError: If `strict` and a linear layer is not covered. The message names each and why.
  """
  shapes = {path: tuple(x.shape) for path, x in flatten(params)}
  observed: dict[Path, Observation] = by_kernel(observations, Observation)
  biases, entries = set(), {}

  def passed_by(path: Path, kind: str, note: str, covered: bool = False) -> LayerEntry:
    shape = shapes[path]
    return LayerEntry(path, kind, shape, None, None, None, math.prod(shape), note, covered)

  for path, shape in shapes.items():
    if path in observed:
      entries[path], bias = _entry(path, shape, observed[path], shapes)
      biases.add(bias)
    elif path in called:
      entries[path] = passed_by(path, called[path], lost)
    elif path[-1] == "kernel":
      note = "no supported linear layer was called with it: a custom module, or not called"
      entries[path] = passed_by(path, "", note)
    else:
      entries[path] = passed_by(path, "", "passes through", covered=True)
  for path, x in observed.items():
    if path not in shapes:
      note = "its kernel is shared with another module, so its statistics would be lost"
      entry = LayerEntry(path, x.kind, x.shape, x.inputs, x.positions, None, 0, note, covered=False)
      entries[path] = entry
  layers = Layers(tuple(entry for path, entry in entries.items() if path not in biases))
  if strict and (missing := [entry for entry in layers.entries if not entry.covered]):
    raise ValueError(
      "BNP cannot precondition these layers:\n"
      + "\n".join(f"  {'/'.join(entry.path)}: {entry.note}." for entry in missing)
      + "\nWithout strict=True, their gradients pass through unchanged."
    )
  return layers


def _entry(
  path: Path, shape: Shape, observed: Observation, params: Mapping[Path, Shape]
) -> tuple[LayerEntry, Path | None]:
  """Return the entry of one kernel, and the path of the bias that it covers, if any."""
  positions, problem, layout = observed.positions, observed.problem, None
  bias = (*path[:-1], observed.layout.bias)
  if not problem:
    found = _stack_axes(shape, observed.shape, observed.marker.shape)
    if found is None:
      problem = (
        f"the parameter of shape {shape} reaches the layer as {observed.shape}, stacked as "
        f"{observed.marker.shape}, so the axes cannot be matched"
      )
    else:
      stack, calls = found
      positions *= math.prod(observed.marker.shape[axis] for axis in calls)
      layout = dataclasses.replace(observed.layout.stacked(stack), calls=calls)
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
    *(path, observed.kind, shape, observed.inputs, positions, layout, size, note),
    covered=not problem,
  )
  return entry, covered_bias


def _stack_axes(shape: Shape, inner: Shape, outer: Shape) -> tuple[Shape, Shape] | None:
  """Match the axes that scan and vmap add to a kernel and to the marker.

  Args:
    shape: Shape of the parameter.
    inner: Its shape inside the layer.
    outer: Axes that the marker gained on its way out, the outermost first.

  Returns:
    The stack axes of the kernel, the outermost first, and the axes of the marker that are repeated
    calls. Where the shapes leave a choice, the stack leads the kernel, as it does by default for
    every scan and vmap. None if calls cannot be separated from the stack.
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
