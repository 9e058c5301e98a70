"""`Layers`: the table of a model's parameters, which lists those that BNP preconditions."""

from collections.abc import Collection, Iterator, Mapping, Sequence
import dataclasses
import functools
import math

from bnp_optax._layout import KernelLayout
from bnp_optax._trees import Path

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class LayerEntry:
  """One entry of the table of `Layers`: a linear layer, or a parameter that belongs to none.

  Attributes:
    path: Path of the kernel, or of the parameter.
    kind: Class of the module that it belongs to, or empty if that is unknown.
    shape: Shape of the kernel, or of the parameter.
    inputs: Shape of the inputs of one call; None if unknown.
    calls: Number of calls of the layer; None if unknown.
    positions: Number of output positions of an example, over all calls; None if unknown.
    layout: Layout of the kernel; None if BNP does not precondition it.
    size: Number of parameters, including those of the bias.
    note: How BNP treats it, or why BNP does not precondition it.
    covered: False for a linear layer that BNP cannot precondition; None if it is unknown whether a
      parameter of two or more axes belongs to a linear layer.
  """

  path: Path
  kind: str
  shape: Shape
  inputs: Shape | None
  calls: int | None
  positions: int | None
  layout: KernelLayout | None
  size: int
  note: str
  covered: bool | None = True


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

  @functools.cached_property
  def biases(self) -> dict[Path, Path]:
    """The path of the bias of each kernel whose layer has one."""
    biased = [x for x in self.entries if x.layout and x.size > math.prod(x.shape)]
    return {x.path: (*x.path[:-1], self[x.path].bias) for x in biased}

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
    lines = [("path", "kind", "shape", "inputs", "calls", "positions", "preconditioned")]
    lines += [
      (
        "/".join(entry.path),
        entry.kind,
        _show(entry.shape),
        "" if entry.inputs is None else _show(entry.inputs),
        *("" if x is None else str(x) for x in (entry.calls, entry.positions)),
        _MARKS[entry.covered] + entry.note,
      )
      for entry in self.entries
    ]
    preconditioned = sum(entry.size for entry in self.entries if entry.layout is not None)
    total = sum(entry.size for entry in self.entries)
    table = plain_table(lines, right={"calls", "positions"})
    share = f"{preconditioned:,} of {total:,} parameters ({preconditioned / max(1, total):.1%})"
    return f"{table}\n{len(self)} layers, {share}"

  __repr__ = __str__


_MARKS = {True: "", False: "NO: ", None: "unknown: "}


def _show(shape: Shape) -> str:
  return "x".join(map(str, shape)) or "scalar"


def plain_table(lines: Sequence[Sequence[str]], right: Collection[str]) -> str:
  """Format lines, headings first, as plain text; columns in ``right`` are aligned to the right."""
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  align = [str.rjust if heading in right else str.ljust for heading in lines[0]]
  table = [
    "  ".join(a(x, w) for a, x, w in zip(align, line, widths, strict=True)).rstrip()
    for line in lines
  ]
  return "\n".join([table[0], "-" * max(map(len, table)), *table[1:]])
