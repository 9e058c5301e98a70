"""Match each layer with its statistics and its running statistics.

The matching is by name and shape and happens while tracing. A mismatch is an error that names the
layer, what was found and what to do.
"""

from collections.abc import Mapping
import dataclasses
import itertools
from typing import Any

import jax
import optax

from bnp_optax._kernels import Layer, layer_path, show_paths
from bnp_optax._layers import Layers
from bnp_optax._layout import KernelLayout
from bnp_optax._statistics import LayerStatistics, NoStatistics, merge_call_axes
from bnp_optax._trees import Path, by_kernel, flatten, flatten_masked, is_masked, show_path, unboxed


def match_statistics(layers: list[Layer], leaves: list[Any], stats: Any) -> list[LayerStatistics]:
  """Return the statistics of each layer, in the order of the layers.

  Raise ValueError if there are no statistics, or not for every layer, or not of its inputs.
  """
  if stats is None:
    raise ValueError(
      "BNP needs the statistics of the forward pass: call tx.update(grads, state, params, "
      "stats=stats) with the statistics that sow_statistics of bnp_optax.linen or bnp_optax.nnx "
      "gathered. Wrappers that drop extra arguments also drop stats. So does bnp around another "
      "transformation of BNP. If a trainer calls tx.update, give it Tapped(model, ...) of "
      "bnp_optax.linen or bnp_optax.nnx as the model."
    )
  found = by_kernel(stats, LayerStatistics, NoStatistics)
  _check_found(layers, found, stats)
  if other := [x for x in layers if _contradicts(found[x.path].layout, x.layout)]:
    raise ValueError(
      f"These layers are not plain Dense or Conv layers, and their kernels have other axes than "
      f"assumed: {', '.join(map(str, other))}. Pass "
      "layers=bnp_optax.linen.layers(model, *inputs) (or bnp_optax.nnx.layers(model, *inputs)), "
      "traced from this model, with the same exact_windows= as in sow_statistics."
    )
  return [_merged(x, leaves[x.kernel].shape, found[x.path]) for x in layers]


def _check_found(
  layers: list[Layer], found: Mapping[Path, LayerStatistics | NoStatistics], stats: Any
) -> None:
  """Raise ValueError if a layer has no statistics."""
  if not found and layers:
    raise ValueError(
      "stats holds no LayerStatistics. Run the forward pass within `with "
      'bnp_optax.linen.sow_statistics():` and with mutable=["intermediates"]; for NNX, within '
      "bnp_optax.nnx.sow_statistics and through nnx.capture(model, bnp_optax.nnx.Statistics). "
      "Enter the context inside the function that is jitted, around the call of the model. Classes "
      "of your own report after bnp_optax.linen.register or bnp_optax.nnx.register. Under nn.vmap "
      "with shared parameters, pass sow_statistics(examples=...). stats is a tree of "
      f"{jax.tree.structure(stats)}."
    )
  if missing := [layer for layer in layers if layer.path not in found]:
    above = next((x.path[0] for x in missing if x.path[1:] in found), None)
    level = "" if above is None else f", or add their first level: stats={{{above!r}: stats}}"
    levels = (
      "The paths differ in their first levels: pass the parameters of the model and its statistics "
      f'themselves, as in variables["params"] and aux["intermediates"]{level}.'
    )
    others = (
      "If these layers did not run, or are not Dense or Conv, leave them out of BNP with "
      "optax.masked or optax.partition, or list the layers that it preconditions with "
      "layers=bnp_optax.linen.layers(model, *inputs) or bnp_optax.nnx.layers(model, *inputs). If "
      "they ran under nn.vmap with shared parameters, pass sow_statistics(examples=...)."
    )
    ends = {path[-n:] for path in found for n in range(1, len(path))}
    nested = len(missing) == len(layers) and any(
      x.path in ends or x.path[-len(y) :] == y for x in missing for y in found
    )
    raise ValueError(
      f"No statistics for {', '.join(map(str, missing))}. There are statistics for "
      f"{show_paths(map(layer_path, found))}. {levels if nested else others}"
    )
  if without := {x: y for x in layers if isinstance(y := found[x.path], NoStatistics)}:
    raise ValueError(
      f"No statistics for {'; '.join(f'{x}: {y.reason}' for x, y in without.items())}. To train "
      "the layer without BNP, leave it out of this optimizer with optax.masked or optax.partition."
    )


def _merged(layer: Layer, shape: tuple[int, ...], statistics: LayerStatistics) -> LayerStatistics:
  """Return the statistics of a layer, whose kernel has a shape, with its calls merged."""
  expected, reported = layer.layout.statistics_shape(shape), statistics.total.shape
  if len(reported) == len(expected) + len(layer.layout.calls):
    statistics = merge_call_axes(statistics, layer.layout.calls)
  if expected != statistics.total.shape:
    raise ValueError(
      f"Layer {layer}: its kernel of shape {shape} takes inputs of shape {expected}, but the "
      f"statistics are of {reported}. Were they taken from another model, or under jax.vmap "
      "without sow_statistics(axis_name=...) and out_axes=None? If the layer is not a plain "
      "Dense or Conv, or ran under nn.scan or nn.vmap, pass "
      "layers=bnp_optax.linen.layers(model, *inputs) or bnp_optax.nnx.layers(model, *inputs)."
    )
  return statistics


def check_table(table: Any, updates: Any, stats: Any) -> None:
  """Raise ValueError if a table of `layers` lacks a kernel of these updates with statistics."""
  if isinstance(table, Layers):
    known = {entry.path for entry in table.entries if entry.covered is not None}
    found = by_kernel(stats, LayerStatistics)
    if new := [path for path, _ in flatten(updates) if path in found and path not in known]:
      raise ValueError(
        f"layers= has no layer {show_paths(map(layer_path, new))}: it is the table of another "
        "model, or of a call without the layer. Trace the model that these gradients belong to, "
        "with the arguments of training."
      )


def check_parameters(params: Any, updates: Any) -> None:
  """Raise ValueError if parameters are not those that the gradients belong to."""
  paths = ([path for path, _ in flatten(x, optax.MaskedNode)] for x in (params, updates))
  for path, other in itertools.zip_longest(*paths):
    if path != other:
      found = " and ".join("none" if x is None else show_path(x) for x in (path, other))
      raise ValueError(
        "bnp: params and the gradients have different leaves; the first that differ are "
        f"{found}. Pass the parameters that the gradients belong to."
      )


def _contradicts(reported: KernelLayout | None, layout: KernelLayout) -> bool:
  """Return True if the layer reported a different layout.

  Axes added by scan or vmap are invisible to the layer.
  """
  return reported is not None and (
    reported != dataclasses.replace(layout, calls=())
    if reported.ndim == layout.ndim
    else reported.exact_windows != layout.exact_windows
  )


def check_state(state: Any, kind: type) -> None:
  """Raise ValueError if a state has another type, for example after a restore without target."""
  if not isinstance(state, kind):
    raise ValueError(
      f"BNP was given a state that is a {type(state).__name__}, not a {kind.__name__}. If it was "
      "restored from a checkpoint, restore it into the structure of this optimizer's state, as in "
      "checkpointer.restore(path, jax.eval_shape(tx.init, params)); otherwise call tx.init."
    )


def match_state(
  field: str, tree: Any, updates: Any, shapes: Mapping[Layer, tuple[int, ...]]
) -> list[Any]:
  """Return the leaves of a field of the state, in the order of the gradients' leaves.

  ``shapes`` has the shape of the field's array for each layer that has one. Raise ValueError if the
  state was made for other parameters, or was cast to less than float32.
  """
  tree = unboxed(tree)
  found, structure = flatten_masked(tree)
  paths, expected = ([path for path, _ in flatten(x, optax.MaskedNode)] for x in (tree, updates))
  added, removed = (
    show_paths(dict.fromkeys(path[:-1] or path for path in x if path not in y))
    for x, y in ((expected, set(paths)), (paths, set(expected)))
  )
  remedy = 'Call tx.init, or keep a part, as in "A state of another model" in docs/recipes.md'
  other = [f"lacks {added}"] * bool(added) + [f"has {removed}, which they lack"] * bool(removed)
  if not other and structure != jax.tree.structure(updates, is_leaf=is_masked):
    other = [f"has the structure {structure}"]
  if other:
    raise ValueError(
      "The state was made for other parameters than these gradients: its "
      f"{field} {' and '.join(other)}. {remedy}."
    )
  for layer, shape in shapes.items():
    actual = getattr(found[layer.kernel], "shape", None)
    if actual != shape:
      raise ValueError(
        f"Layer {layer}: the state's {field} should be of shape {shape}, found {actual}. The state "
        f"was made for other parameters or another debias=. {remedy}."
      )
    if (dtype := found[layer.kernel].dtype) not in ("float32", "float64"):
      raise ValueError(
        f"Layer {layer}: the state's {field} is {dtype}. Below float32, rounding stops a running "
        "mean before it converges: leave the state in the dtype that tx.init gave it."
      )
  kernels = {layer.kernel for layer in shapes}
  other = [paths[i] for i, x in enumerate(found) if i not in kernels and not is_masked(x)]
  if other:
    raise ValueError(
      f"The state's {field} has an array for {show_paths(other)}, which is no layer of these "
      f"parameters: it was made with other layers= or another debias=. {remedy}."
    )
  return found
