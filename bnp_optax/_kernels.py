"""The layers of a tree of parameters: each kernel with its layout and its bias, found by path."""

from collections.abc import Collection, Iterable, Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bnp_optax._layers import Layers
from bnp_optax._layout import KernelLayout
from bnp_optax._trees import Path, flatten, is_masked, show_path

Layouts = Mapping[Path, KernelLayout]


@dataclasses.dataclass(frozen=True)
class Layer:
  """One layer of the parameters: the path and layout of its kernel, and where its leaves are."""

  path: Path
  layout: KernelLayout
  kernel: int  # Index among the leaves.
  bias: int | None  # Index among the leaves; None without bias.

  def __str__(self) -> str:
    return show_path(layer_path(self.path))


def find_layers(tree: Any, layouts: Layouts | None) -> list[Layer]:
  """Return the layers whose kernels are in a tree of parameters or gradients.

  Raise ValueError if a kernel is not that of a linear layer, or if its bias is missing.
  """
  named = flatten(tree, optax.MaskedNode)
  leaves = [leaf for _, leaf in named]
  index = {path: i for i, (path, _) in enumerate(named)}
  if layouts is not None:
    _check_paths(layouts, index)
  layers: list[Layer] = []
  for path, i in index.items():
    if not path or (path[-1] != "kernel" if layouts is None else path not in layouts):
      continue
    bias_name = "bias" if layouts is None else layouts[path].bias
    j = index.get((*path[:-1], bias_name))
    kernel, bias = leaves[i], None if j is None else leaves[j]
    if bias is not None and is_masked(kernel) != is_masked(bias):
      raise _split_layer(path, kernel_present=is_masked(bias))
    if is_masked(kernel):
      continue
    layout = _layout_of_kernel(path, kernel, layouts)
    if bias is not None:
      _check_bias(path, bias, layout.bias_shape(kernel.shape), kernel.shape)
    elif layouts is not None and not isinstance(layouts, Layers):
      _check_other_bias(path, kernel.shape, layouts, named)
    layer = Layer(path, layout, i, j)
    for other in layers:
      if layer.bias is not None and layer.bias == other.bias:
        raise ValueError(
          f"Layers {other} and {layer} have the same bias, {layout.bias}. BNP couples a bias with "
          "one kernel: register or report the other one with bias=None."
        )
    layers.append(layer)
  return layers


def _check_paths(layouts: Layouts, paths: Collection[Path]) -> None:
  """Raise ValueError if kernels of ``layouts``, or their biases, are not among the parameters."""
  missing = [path for path in layouts if path not in paths]
  # The table of a model may serve for a part of its parameters, such as those that are trained.
  if missing and (len(missing) == len(layouts) or not isinstance(layouts, Layers)):
    above = next((path[0] for path in paths if path[1:] == missing[0]), None)
    level = (
      ""
      if above is None
      else f", or add their first level: layers={{({above!r}, *path): x for path, x in "
      f"layers.items()}} and stats={{{above!r}: stats}}"
    )
    raise ValueError(
      f"These kernels in layers= are not in the parameters: {show_paths(missing)}. The parameters "
      f"are {show_paths(paths)}. Trace the model that these parameters belong to, and pass the "
      f'"params" collection itself to this transformation{level}. A key of layers= is a tuple of '
      "names."
    )
  for path, bias in layouts.biases.items() if isinstance(layouts, Layers) else ():
    if (path in paths) != (bias in paths):
      raise _split_layer(path, kernel_present=path in paths)


def _layout_of_kernel(path: Path, kernel: jax.Array, layouts: Layouts | None) -> KernelLayout:
  """Return the layout of a kernel; raise ValueError if it is not that of a linear layer."""
  where = show_path(layer_path(path))
  if not jnp.issubdtype(kernel.dtype, jnp.floating):
    raise ValueError(
      f"Layer {where}: BNP is defined for real kernels, but its kernel is {kernel.dtype}. Leave "
      "the layer out with optax.masked or optax.partition."
    )
  if layouts is None:
    if kernel.ndim < 2:
      raise ValueError(
        f"Layer {where}: a kernel of shape {kernel.shape} is not that of a Dense or Conv. Leave "
        "the layer out with optax.masked or optax.partition."
      )
    return KernelLayout.by_convention(kernel.ndim)
  layout = layouts[path]
  if layout.ndim != kernel.ndim:
    raise ValueError(
      f"Layer {where}: layers= has a layout of {layout.ndim} axes for it, {layout}, but its kernel "
      f"has shape {kernel.shape}. Trace the model that these parameters belong to."
    )
  return layout


def _check_bias(
  path: Path, bias: jax.Array, expected: tuple[int, ...], kernel_shape: tuple[int, ...]
) -> None:
  """Raise ValueError if the bias of a layer does not have the expected shape."""
  if not _fits(bias, expected):
    raise ValueError(
      f"Layer {show_path(layer_path(path))}: the bias has shape {bias.shape}, but its kernel of "
      f"shape {kernel_shape} requires {expected}. If the layer is not a plain Dense or Conv, pass "
      "layers=bnp_optax.linen.layers(model, *inputs) or layers=bnp_optax.nnx.layers(model, "
      "*inputs)."
    )


def _fits(bias: Any, shape: tuple[int, ...]) -> bool:
  """Return True if a bias has a shape, or has it before axes of size 1, as in Equinox's Conv."""
  return bias.shape == (*shape, *(1,) * (bias.ndim - len(shape)))


def _check_other_bias(
  path: Path, kernel_shape: tuple[int, ...], layouts: Layouts, named: Iterable[tuple[Path, Any]]
) -> None:
  """Raise ValueError if a layer has no bias of its layout's name, but another leaf may be it."""
  layout = layouts[path]
  if not layout.bias:
    return
  shape = layout.bias_shape(kernel_shape)
  for other, x in named:
    beside = other[:-1] == path[:-1] and other != path and other not in layouts
    if beside and not is_masked(x) and _fits(x, shape):
      raise ValueError(
        f"Layer {show_path(layer_path(path))}: layers= names its bias {layout.bias!r}, which it "
        f"does not have, but {other[-1]!r} has the shape of a bias. Pass "
        f"KernelLayout(bias={other[-1]!r}), or bias='' if the layer has no bias."
      )


def choose_layer(layers: list[Layer], path: Path | None) -> Layer:
  """Return the layer whose kernel is at a path; the only layer for None."""
  found = [layer for layer in layers if path is None or layer.path == tuple(path)]
  if len(found) != 1:
    raise ValueError(
      f"{'Several layers' if found else f'No layer at {path}'}: give layer= one of "
      f"{[layer.path for layer in layers]}."
    )
  return found[0]


def layer_path(path: Path) -> Path:
  """Return the path that names a layer: its module's, or its kernel's if it has another name."""
  return path[:-1] if path[-1] == "kernel" else path


def show_paths(paths: Iterable[Path]) -> str:
  return ", ".join(map(show_path, paths))


def _split_layer(path: Path, *, kernel_present: bool) -> ValueError:
  """Return the error of a layer of which only the kernel or only the bias is present."""
  present, missing = ("kernel", "bias") if kernel_present else ("bias", "kernel")
  return ValueError(
    f"Layer {show_path(layer_path(path))}: its {present} is given to BNP, its {missing} is masked "
    "or left out. BNP updates a layer's kernel and bias together: give it both or neither."
  )
