"""The layers of a tree of parameters: each kernel with its layout and its bias, found by path."""

from collections.abc import Iterable, Mapping
import dataclasses
from typing import Any

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
  missing = [path for path in layouts or () if path not in index]
  # The table of a model may serve for a part of its parameters, such as those that are trained.
  if missing and (len(missing) == len(layouts or ()) or not isinstance(layouts, Layers)):
    above = next((path[0] for path in index if path[1:] == missing[0]), None)
    level = (
      ""
      if above is None
      else f", or add their first level: layers={{({above!r}, *path): x for path, x in "
      f"layers.items()}} and stats={{{above!r}: stats}}"
    )
    raise ValueError(
      f"These kernels in layers= are not in the parameters: {show_paths(missing)}. The parameters "
      f"are {show_paths(index)}. Trace the model that these parameters belong to, and pass the "
      f'"params" collection itself to this transformation{level}. A key of layers= is a tuple of '
      "names."
    )
  for path, bias in layouts.biases.items() if isinstance(layouts, Layers) else ():
    if (path in index) != (bias in index):
      parts = ("kernel", "bias") if path in index else ("bias", "kernel")
      raise ValueError(_split_layer(layer_path(path), *parts))
  layers = []
  for path, i in index.items():
    if not path or (path[-1] != "kernel" if layouts is None else path not in layouts):
      continue
    where = layer_path(path)
    bias_name = "bias" if layouts is None else layouts[path].bias
    kernel, j = leaves[i], index.get((*path[:-1], bias_name))
    bias = None if j is None else leaves[j]
    if is_masked(kernel):
      if bias is not None and not is_masked(bias):
        raise ValueError(_split_layer(where, "bias", "kernel"))
      continue
    if is_masked(bias):
      raise ValueError(_split_layer(where, "kernel", "bias"))
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
      raise ValueError(
        f"Layer {show_path(where)}: BNP is defined for real kernels, but its kernel is "
        f"{kernel.dtype}. Leave the layer out with optax.masked or optax.partition."
      )
    if layouts is not None:
      layout = layouts[path]
    elif kernel.ndim >= 2:
      layout = KernelLayout.by_convention(kernel.ndim)
    else:
      raise ValueError(
        f"Layer {show_path(where)}: a kernel of shape {kernel.shape} is not that of a Dense or "
        "Conv. Leave the layer out with optax.masked or optax.partition."
      )
    if layout.ndim != kernel.ndim:
      raise ValueError(
        f"Layer {show_path(where)}: layers= has a layout of {layout.ndim} axes for it, {layout}, "
        f"but its kernel has shape {kernel.shape}. Trace the model that these parameters belong to."
      )
    if bias is None and layouts is not None and not isinstance(layouts, Layers):
      _check_other_bias(path, kernel.shape, layouts, named)
    if bias is not None and not _fits(bias, layout.bias_shape(kernel.shape)):
      raise ValueError(
        f"Layer {show_path(where)}: the bias has shape {bias.shape}, but its kernel of shape "
        f"{kernel.shape} requires {layout.bias_shape(kernel.shape)}. If the layer is not a plain "
        "Dense or Conv, pass layers=bnp_optax.linen.layers(model, *inputs) or "
        "layers=bnp_optax.nnx.layers(model, *inputs)."
      )
    layer = Layer(path, layout, i, j if bias is not None else None)
    for other in layers:
      if layer.bias is not None and layer.bias == other.bias:
        raise ValueError(
          f"Layers {other} and {layer} have the same bias, {layout.bias}. BNP couples a bias with "
          "one kernel: register or report the other one with bias=None."
        )
    layers.append(layer)
  return layers


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


def _split_layer(path: Path, present: str, masked: str) -> str:
  return (
    f"Layer {show_path(path)}: its {present} is given to BNP, its {masked} is masked or left out. "
    "BNP updates a layer's kernel and bias together: give it both or neither."
  )
