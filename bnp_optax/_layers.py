"""`Layers`: which parameters of a model BNP preconditions, found by tracing it, and their table.

A framework's room traces its model with `jax.eval_shape` and leaves an `Observation` beside each
linear layer, as it leaves statistics there in training. What comes out stacked has been scanned.
"""

from collections.abc import Callable, Iterator, Mapping
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
from bnp_optax._table import plain_table

Path = tuple[str, ...]
Shape = tuple[int, ...]

# An NNX variable, or a parameter with metadata, is a node of its own around its value.
_BOXED = (jax.tree_util.GetAttrKey("value"),)


def flatten(tree: Any, *kinds: type) -> list[tuple[Path, Any]]:
  """The leaves of a tree with their paths, which name a leaf alike in every framework's trees."""
  keys = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, kinds))[0]
  return [(name_path(path), leaf) for path, leaf in keys]


def by_kernel(tree: Any, *kinds: type) -> dict[Path, Any]:
  """What of some kinds is in a tree, by the path of the kernel that it lies beside."""
  return {(*path[:-1], x.kernel): x for path, x in flatten(tree, *kinds) if isinstance(x, kinds)}


def name_path(keys: tuple[Any, ...]) -> Path:
  """The names along a path of JAX's keys."""
  names = tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in keys)
  return names[:-1] if keys[-1:] == _BOXED else names


def unboxed(tree: Any) -> Any:
  """A tree with the values of its boxes in their place.

  What a box says of a kernel, such as how it is split over devices, is not true of a mean.
  """

  def inside(x: Any) -> Any:
    children = jax.tree_util.tree_flatten_with_path(x, is_leaf=lambda y: y is not x)[0]
    return children[0][1] if [keys for keys, _ in children] == [_BOXED] else x

  return jax.tree.map(inside, tree, is_leaf=lambda x: inside(x) is not x)


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the table: a linear layer, or parameters that belong to none.

  Attributes:
    path: the path of the kernel, or of the parameter.
    kind: the class of the layer, or empty.
    shape: the shape of the kernel, or of the parameter.
    inputs: the shape of what the layer was given in one call.
    positions: output positions an example, over all calls.
    layout: the layout of the kernel; None if BNP does not precondition it.
    size: the number of parameters, those of the bias included.
    note: how it is treated, or why it is not.
    covered: False if this is a linear layer that BNP ought to precondition and cannot.
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

  An immutable, hashable mapping from the path of each kernel that BNP preconditions to its layout;
  printed, it is a table of all parameters. Pass it as ``layers`` to `bnp_optax.scale_by_bnp` or
  `bnp_optax.bnp`.

  Attributes:
    rows: the lines of the table.
  """

  rows: tuple[Row, ...]

  @functools.cached_property
  def _layouts(self) -> dict[Path, KernelLayout]:
    return {row.path: row.layout for row in self.rows if row.layout is not None}

  def __getitem__(self, path: Path) -> KernelLayout:
    """The layout of the kernel at a path."""
    return self._layouts[path]

  def __iter__(self) -> Iterator[Path]:
    """Over the paths of the kernels."""
    return iter(self._layouts)

  def __len__(self) -> int:
    """The number of kernels."""
    return len(self._layouts)

  def __str__(self) -> str:
    """The table, as plain text."""
    lines = [("path", "kind", "shape", "inputs", "positions", "preconditioned")]
    lines += [
      (
        "/".join(row.path),
        row.kind,
        _show(row.shape),
        "" if row.inputs is None else _show(row.inputs),
        "" if row.positions is None else str(row.positions),
        row.note if row.covered else f"NO: {row.note}",
      )
      for row in self.rows
    ]
    inside = sum(row.size for row in self.rows if row.layout is not None)
    total = sum(row.size for row in self.rows)
    table = plain_table(lines, right={"positions"})
    return f"{table}\n{len(self)} layers, {inside:,} of {total:,} parameters"

  __repr__ = __str__


def _show(shape: Shape) -> str:
  return "x".join(map(str, shape)) or "scalar"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Observation:
  """What one layer is, sown beside it while the model is traced; static but for the marker.

  Attributes:
    marker: a scalar where it is sown; scan and vmap stack it as they stack statistics.
    kind: the class of the layer.
    kernel: the name of the kernel's leaf.
    shape: the shape of the kernel as the layer sees it.
    inputs: the shape of what the layer was given.
    positions: output positions an example, over all calls.
    layout: the layout of the kernel as the layer sees it.
    problem: why BNP is not defined for it, or empty.
  """

  marker: jax.Array
  kind: str = dataclasses.field(metadata={"static": True})
  kernel: str = dataclasses.field(metadata={"static": True})
  shape: Shape = dataclasses.field(metadata={"static": True})
  inputs: Shape = dataclasses.field(metadata={"static": True})
  positions: int = dataclasses.field(metadata={"static": True})
  layout: KernelLayout = dataclasses.field(metadata={"static": True})
  problem: str = dataclasses.field(metadata={"static": True})


def observe(call: Call, kind: str, shape: Shape, example_axes: int = 1) -> Observation:
  """What `layers` wants to know of one call of a layer."""
  examples = max(1, math.prod(call.example_shape(example_axes)))
  rows = math.prod(call.leading) if call.rows is None else call.rows
  return Observation(
    marker=jnp.zeros(()),
    kind=kind,
    kernel=call.kernel,
    shape=tuple(shape),
    inputs=call.inputs.shape,
    positions=rows // examples,
    layout=call.layout,
    problem=call.problem,
  )


def merge_observations(a: Observation, b: Observation) -> Observation:
  """The observation of a layer called twice."""
  problem = a.problem or b.problem
  if (a.shape, a.layout) != (b.shape, b.layout):
    problem = problem or TWO_MEANINGS
  return dataclasses.replace(a, positions=a.positions + b.positions, problem=problem)


def split_arrays(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
  """The arrays of a tree, to be traced, and what puts others in their place."""
  leaves, treedef = jax.tree.flatten(tree)
  where = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]

  def rebuild(arrays: list[Any]) -> Any:
    filled = dict(enumerate(leaves)) | dict(zip(where, arrays, strict=True))
    return treedef.unflatten(filled.values())

  return [leaves[i] for i in where], rebuild


def make_layers(
  params: Any,
  observations: Any,
  called: Mapping[Path, str],
  lost: str,
  strict: bool,
) -> Layers:
  """The table of a model.

  Args:
    params: the parameters, or their shapes.
    observations: a tree in which each `Observation` lies beside its kernel.
    called: the class of every linear layer that was called, by the path of its kernel, whether or
      not its observation came back.
    lost: why an observation may not have come back, and what to do.
    strict: whether to raise if a linear layer is not covered.

  Raises:
    ValueError: if `strict` and a linear layer is not covered, naming each and why.
  """
  shapes = {path: tuple(x.shape) for path, x in flatten(params)}
  seen: dict[Path, Observation] = by_kernel(observations, Observation)
  biases, rows = set(), {}
  for path, shape in shapes.items():
    if path in seen:
      row, bias = _row(path, shape, seen[path], shapes)
      rows[path] = row
      if row.layout is not None and bias is not None:
        biases.add(bias)
    elif path in called:
      rows[path] = Row(
        path, called[path], shape, None, None, None, math.prod(shape), lost, covered=False
      )
    elif path[-1] == "kernel":
      why = "no linear layer that BNP knows was called with it: a custom module, or not called"
      rows[path] = Row(path, "", shape, None, None, None, math.prod(shape), why, covered=False)
    else:
      rows[path] = Row(path, "", shape, None, None, None, math.prod(shape), "passes through")
  for path, x in seen.items():
    if path not in shapes:
      why = "its kernel is a parameter elsewhere, where what is seen here is missed"
      rows[path] = Row(path, x.kind, x.shape, x.inputs, x.positions, None, 0, why, covered=False)
  layers = Layers(tuple(row for path, row in rows.items() if path not in biases))
  if strict and (missing := [row for row in layers.rows if not row.covered]):
    raise ValueError(
      "BNP cannot precondition these layers:\n"
      + "\n".join(f"  {'/'.join(row.path)}: {row.note}." for row in missing)
      + "\nWithout strict=True, they are left to the optimizer as they are."
    )
  return layers


def _row(
  path: Path, shape: Shape, seen: Observation, params: Mapping[Path, Shape]
) -> tuple[Row, Path | None]:
  """The row of one kernel, and the path of its bias, if it has one."""
  positions, problem, layout = seen.positions, seen.problem, None
  bias = (*path[:-1], seen.layout.bias)
  if not problem:
    found = _stack_axes(shape, seen.shape, seen.marker.shape)
    if found is None:
      problem = (
        f"the parameter of shape {shape} reaches the layer as {seen.shape}, stacked as "
        f"{seen.marker.shape}: which axis is which cannot be told"
      )
    else:
      stack, calls = found
      positions *= math.prod(seen.marker.shape[axis] for axis in calls)
      layout = dataclasses.replace(seen.layout.stacked(stack), calls=calls)
      expected = layout.bias_shape(shape)
      if bias in params and params[bias] != expected:
        problem = (
          f"its bias has shape {params[bias]} instead of {expected}; if it is stacked by nn.scan "
          'or nn.vmap, use variable_axes={"params": 0}'
        )
  size = math.prod(shape)
  if problem:
    row = Row(path, seen.kind, shape, seen.inputs, positions, None, size, problem, covered=False)
    return row, None
  if bias not in params:
    note = "yes, without bias: not centred"
    return Row(path, seen.kind, shape, seen.inputs, positions, layout, size, note), None
  size += math.prod(params[bias])
  return Row(path, seen.kind, shape, seen.inputs, positions, layout, size, "yes"), bias


def _stack_axes(shape: Shape, inner: Shape, outer: Shape) -> tuple[Shape, Shape] | None:
  """Which axes of a kernel are stacked, and which axes of what was sown are repeated calls.

  Args:
    shape: the shape of the parameter.
    inner: its shape as the layer saw it.
    outer: the axes that what was sown got on its way out, the outermost first.

  Returns:
    The axes of the kernel, outermost stack first, and the axes of what was sown. Where shapes
    alone leave a choice, the stack leads the kernel, as the default of every scan and vmap has it;
    None if the calls cannot be told from the stack.
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
