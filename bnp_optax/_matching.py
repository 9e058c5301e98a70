"""What belongs together: a kernel, its bias, its statistics and its running statistics.

Names and shapes decide, while tracing. What does not fit is an error that names the layer, says
what was found and what to do.
"""

from collections.abc import Iterable, Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bnp_optax._layers import Path, by_kernel, flatten, unboxed
from bnp_optax._layout import KernelLayout
from bnp_optax._statistics import LayerStatistics, NoStatistics, merge_call_axes

Layouts = Mapping[Path, KernelLayout]


@dataclasses.dataclass(frozen=True)
class Layer:
  """One layer of the parameters: where its kernel and its bias are among the leaves."""

  path: Path
  layout: KernelLayout
  kernel: int
  bias: int | None

  def __str__(self) -> str:
    return _name(_module(self.path))


def find_layers(tree: Any, layouts: Layouts | None) -> list[Layer]:
  """The layers whose kernels are in a tree of parameters or gradients.

  Raises:
    ValueError: if a kernel is no kernel of a linear layer, or stands without the bias that
      belongs to it.
  """
  named = flatten(tree, optax.MaskedNode)
  leaves = [leaf for _, leaf in named]
  index = {path: i for i, (path, _) in enumerate(named)}
  if layouts and not any(path in index for path in layouts):
    raise ValueError(
      f"None of the kernels that layers= names is in the parameters. It names {_names(layouts)}; "
      f"the parameters are {_names(index)}. Trace the model that these parameters belong to, and "
      'give this transformation the "params" collection itself.'
    )
  layers = []
  for path, i in index.items():
    if not path or (path[-1] != "kernel" if layouts is None else path not in layouts):
      continue
    where = _module(path)
    bias_name = "bias" if layouts is None else layouts[path].bias
    kernel, j = leaves[i], index.get((*path[:-1], bias_name))
    bias = None if j is None else leaves[j]
    if _is_masked(kernel):
      if bias is not None and not _is_masked(bias):
        raise ValueError(_torn(where, "bias", "kernel"))
      continue
    if _is_masked(bias):
      raise ValueError(_torn(where, "kernel", "bias"))
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
      raise ValueError(
        f"Layer {_name(where)}: BNP is defined for real kernels, but this one is {kernel.dtype}. "
        "Leave the layer out with optax.masked or optax.partition."
      )
    if layouts is not None:
      layout = layouts[path]
    elif kernel.ndim >= 2:
      layout = KernelLayout.by_convention(kernel.ndim)
    else:
      raise ValueError(
        f"Layer {_name(where)}: a kernel of shape {kernel.shape} is not that of a Dense or Conv. "
        "Leave the layer out with optax.masked or optax.partition."
      )
    if layout.ndim != kernel.ndim:
      raise ValueError(
        f"Layer {_name(where)}: layers= has a layout of {layout.ndim} axes for it, {layout}, but "
        f"its kernel has shape {kernel.shape}. Trace the model that these parameters belong to."
      )
    if bias is not None and bias.shape != layout.bias_shape(kernel.shape):
      raise ValueError(
        f"Layer {_name(where)}: the bias has shape {bias.shape}, but by its kernel of shape "
        f"{kernel.shape} it should have {layout.bias_shape(kernel.shape)}. If the layer is not a "
        "plain Dense or Conv, pass layers=bnp_optax.linen.layers(model, *inputs)."
      )
    layers.append(Layer(path, layout, i, j if bias is not None else None))
  return layers


def match_statistics(layers: list[Layer], leaves: list[Any], stats: Any) -> list[LayerStatistics]:
  """What each layer saw, in the order of the layers.

  Raises:
    ValueError: if there are no statistics, or not for every layer, or not of its inputs.
  """
  if stats is None:
    raise ValueError(
      "BNP needs the statistics of the forward pass: call tx.update(grads, state, params, "
      "stats=stats) with what bnp_optax.linen.sow_statistics gathered. A wrapper that drops "
      "extra arguments loses them too."
    )
  found: dict[Path, LayerStatistics] = by_kernel(stats, LayerStatistics, NoStatistics)
  if not found and layers:
    raise ValueError(
      "stats holds no LayerStatistics. Was the forward pass run with "
      'mutable=["intermediates"], and within `with bnp_optax.linen.sow_statistics():`; with NNX, '
      "through nnx.capture(model, bnp_optax.nnx.Statistics), within bnp_optax.nnx's? The "
      "context belongs inside the function that is jitted, around the call of the model. stats is "
      f"a tree of {jax.tree.structure(stats)}."
    )
  if missing := [layer for layer in layers if layer.path not in found]:
    raise ValueError(
      f"No statistics for {', '.join(map(str, missing))}. They came for "
      f"{_names(map(_module, found))}. If these layers did not run, or are no Dense or "
      "Conv, leave them out of this optimizer with optax.masked or optax.partition, or name the "
      "layers it is for with "
      "layers=bnp_optax.linen.layers(model, *inputs). If they ran under nn.scan or nn.vmap, add "
      '"intermediates" to its variable_axes.'
    )
  if without := {x: y for x in layers if isinstance(y := found[x.path], NoStatistics)}:
    raise ValueError(
      f"No statistics for {'; '.join(f'{x}: {y.reason}' for x, y in without.items())}. If BNP is "
      "not to precondition it, leave the layer out of this optimizer with optax.masked or "
      "optax.partition."
    )
  if other := [layer for layer in layers if _is_another(layer.layout, found[layer.path].layout)]:
    raise ValueError(
      f"These layers are no plain Dense or Conv, and their kernels' axes are not what they were "
      f"taken for: {', '.join(map(str, other))}. Pass "
      "layers=bnp_optax.linen.layers(model, *inputs) (or bnp_optax.nnx.layers(model, *inputs)), "
      "traced from this model, with the same exact_windows= as in sow_statistics."
    )
  merged = []
  for layer in layers:
    shape, statistics = leaves[layer.kernel].shape, found[layer.path]
    expected, saw = layer.layout.statistics_shape(shape), statistics.total.shape
    if len(saw) == len(expected) + len(layer.layout.calls):
      statistics = merge_call_axes(statistics, layer.layout.calls)
    if expected != statistics.total.shape:
      raise ValueError(
        f"Layer {layer}: its kernel of shape {shape} takes inputs of shape {expected}, but the "
        f"statistics are of {saw}. Were they taken from another model, or under jax.vmap without "
        "sow_statistics(axis_name=...) and out_axes=None? If the layer is not a plain Dense or "
        "Conv, or ran under nn.scan or nn.vmap, pass layers=bnp_optax.linen.layers(model, *inputs)."
      )
    merged.append(statistics)
  return merged


def _is_another(layout: KernelLayout, seen: KernelLayout | None) -> bool:
  """Whether the layer itself saw its kernel otherwise; what is stacked from outside, it cannot."""
  return seen is not None and (
    seen != dataclasses.replace(layout, calls=())
    if seen.ndim == layout.ndim
    else seen.exact_windows != layout.exact_windows
  )


def check_state(state: Any, kind: type) -> None:
  """Raises ValueError if a state is not of its own type, as one restored without a target is."""
  if not isinstance(state, kind):
    raise ValueError(
      f"BNP was given a state that is a {type(state).__name__}, not a {kind.__name__}. If it was "
      "restored from a checkpoint, restore it into the structure of this optimizer's state, as in "
      "checkpointer.restore(path, jax.eval_shape(tx.init, params)); else call tx.init."
    )


def match_state(
  field: str, tree: Any, treedef: Any, leaves: list[Any], layers: list[Layer]
) -> list[Any]:
  """The leaves of a field of the state, in the order of the gradients' leaves.

  Raises:
    ValueError: if the state was made for other parameters, or was cast to less than float32.
  """
  found, structure = flatten_masked(unboxed(tree))
  expected = {
    layer.kernel: layer.layout.statistics_shape(leaves[layer.kernel].shape) for layer in layers
  }
  for layer in layers:
    saw = getattr(found[layer.kernel], "shape", None) if layer.kernel < len(found) else None
    if saw != expected[layer.kernel]:
      raise ValueError(
        f"Layer {layer}: the state's {field} should be of shape {expected[layer.kernel]}, found "
        f"{saw}. The state was made for other parameters: call tx.init with these."
      )
    if (dtype := found[layer.kernel].dtype) not in ("float32", "float64"):
      raise ValueError(
        f"Layer {layer}: the state's {field} is {dtype}. In less than float32 a running mean stops "
        "long before it is right: leave the state in the dtype that tx.init gave it."
      )
  if structure != treedef or any(
    not _is_masked(x) for i, x in enumerate(found) if i not in expected
  ):
    raise ValueError(
      "The state was made for other parameters than these gradients: call tx.init with the "
      f"parameters. The structure of its {field} is {structure}, the gradients' is {treedef}."
    )
  return found


def flatten_masked(tree: Any) -> tuple[list[Any], Any]:
  """The leaves and the structure of a tree, with `optax.MaskedNode` as a leaf."""
  return jax.tree.flatten(tree, is_leaf=_is_masked)


def _is_masked(x: Any) -> bool:
  return isinstance(x, optax.MaskedNode)


def _name(path: Path) -> str:
  return "/".join(path) or "(the model itself)"


def _module(path: Path) -> Path:
  """What a layer goes by: the path of its module, unless that has several kernels."""
  return path[:-1] if path[-1] == "kernel" else path


def _names(paths: Iterable[Path]) -> str:
  return ", ".join(_name(path) for path in paths)


def _torn(path: Path, here: str, away: str) -> str:
  return (
    f"Layer {_name(path)}: its {here} is given to BNP, its {away} is masked out. A layer's kernel "
    "and bias make up for each other's steps and belong together: mask both or neither."
  )
