"""`diagnose`: diagnostics of each layer during training, from the statistics alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from bnp_optax._kernels import Layouts, find_layers
from bnp_optax._layers import plain_table
from bnp_optax._matching import match_statistics
from bnp_optax._running import RunningStatistics, ScaleByBnpState
from bnp_optax._statistics import LayerStatistics, NoStatistics
from bnp_optax._taps import read_taps
from bnp_optax._trees import by_kernel, flatten, flatten_masked, unboxed
from bnp_optax.conditioning._prediction import layer_values

_LARGE_EIGENVALUE = 10.0
_OUTLIER = 1e4
_LARGE_GUARD = 2.0
_FREQUENT_GUARD = 0.5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Diagnostics:
  r"""The diagnostics of each layer at one step. Printed, it is a table.

  Every array is ``[layers]``, float32, in the order of ``names``, or ``[steps, layers]`` if the
  diagnostics of several steps are stacked; the table is then that of the last step. A stack of
  linear maps is represented by the worst one. Below, :math:`\mu, \tilde\sigma` are the
  preconditioner's mean and deviation, and :math:`\mu_H, \sigma_H^2` are the mean and variance of
  the batch.

  Attributes:
    rows: Number of rows of H in the batch; 0 if the layer's statistics are missing.
    features: Number of features.
    inputs: Number of inputs of one output: window times features of a group.
    dead: Number of features that are constant over the batch.
    spread: The largest over the smallest nonzero variance :math:`\sigma_H^2`.
    outlier: The largest of these variances over their median. Above 100, the paper's
      :math:`\epsilon_1` keeps P from normalizing most features.
    kappa_D: :math:`\kappa(D)` of the preconditioner's :math:`D = \mathrm{diag}(1, 1/\tilde\sigma)`.
    lag: Distance of the running mean from that of the batch, in standard deviations: the root mean
      square of :math:`\delta = (\mu_H - \mu) / \tilde\sigma` over the features.
    variance_ratio: The largest :math:`\sigma_H^2 / \tilde\sigma^2`, with the second moment in place
      of :math:`\sigma_H^2` where there is no bias. Above 1, P is too large for this batch. Well
      below 1 with ``debias=False``, the running variance is still decreasing from its initial value
      of 1, and the layer's steps will grow by the inverse factor.
    largest_eigenvalue: Predicted largest eigenvalue of
      :math:`P^T \hat H^T \hat H P / \text{rows}` for uncorrelated features. With a bias, it is 1 if
      the running statistics equal those of the batch, and a lag alone makes it :math:`1 + n
      \delta^2` or up to 1 more, where :math:`n` is the number of inputs of one output.
    q2: The paper's :math:`q^2`, which ``scale_layers=False`` does not apply.
    guard: Divisor of the layer's step by ``lag_guard``; 1 where it does not act.
    improvement: Factor by which P lowers the condition number of :math:`\hat H^T \hat H`, for
      uncorrelated features. Below 1, BNP raises it.
    names: The layers.
  """

  rows: jax.Array
  features: jax.Array
  inputs: jax.Array
  dead: jax.Array
  spread: jax.Array
  outlier: jax.Array
  kappa_D: jax.Array  # noqa: N815
  lag: jax.Array
  variance_ratio: jax.Array
  largest_eigenvalue: jax.Array
  q2: jax.Array
  guard: jax.Array
  improvement: jax.Array
  names: tuple[str, ...] = dataclasses.field(metadata={"static": True})

  def notes(self) -> list[str]:
    """Describe the problems of each layer in words; a healthy layer gets an empty string.

    A note reports missing statistics, statistics that are not finite, more than half of the inputs
    dead, an outlier above 1e4, a largest eigenvalue above 10 times 1 + inputs / rows (its value
    under the sampling noise of a batch's mean), an improvement below 0.99, and a guard that divides
    the step by more than 2, or that acts in more than half of several steps.
    """
    guarded = np.mean(np.atleast_2d(self.guard) > 1, axis=0).tolist()
    return [_note(x, part) for x, part in zip(self._last(), guarded, strict=True)]

  def _last(self) -> list[Diagnostics]:
    """Return the numbers of each layer in the last step, as floats."""
    last = jax.tree.map(lambda x: np.atleast_2d(x)[-1], self)
    return [jax.tree.map(lambda x, i=i: float(x[i]), last) for i in range(len(self.names))]

  def __str__(self) -> str:
    """Return the table as plain text."""
    columns = ("spread", "kappa_D", "lag", "variance_ratio")
    columns += ("largest_eigenvalue", "q2", "guard", "improvement")
    lines: list[tuple[str, ...]] = [("layer", "rows", "dead", *columns, "")]
    for name, x, note in zip(self.names, self._last(), self.notes(), strict=True):
      dead = "-" if np.isnan(x.dead) else f"{int(x.dead)}/{int(x.features)}"
      numbers = (getattr(x, column) for column in columns)
      shown = ("-" if np.isnan(number) else f"{number:.3g}" for number in numbers)
      lines.append((name, f"{x.rows:.0f}", dead, *shown, note))
    return plain_table(lines, right=lines[0][1:-1])


def diagnose(
  params: Any,
  state: Any,
  stats: Any,
  *,
  eps_relative: ArrayLike = 1e-2,
  eps_absolute: ArrayLike = 1e-4,
  lag_guard: ArrayLike | None = None,
  layers: Layouts | None = None,
) -> Diagnostics:
  r"""Compute the diagnostics of each layer, from BNP's state and the statistics of one batch.

  Call it in the training step, after ``update``, with the arguments and the new state of
  ``update``. It works under `jax.jit` and `jax.lax.scan` and costs O(features) for each layer.

  Examples:
    >>> import bnp_optax, flax.linen as nn, jax, jax.numpy as jnp
    >>> from bnp_optax import conditioning
    >>> model, tx = nn.Dense(3), bnp_optax.scale_by_bnp()
    >>> x = jax.random.normal(jax.random.key(0), (64, 5))
    >>> params = model.init(jax.random.key(1), x)["params"]
    >>> state = tx.init(params)
    >>> for x in [x] * 9 + [x + 10.0]:
    ...   with bnp_optax.linen.sow_statistics():
    ...     _, aux = model.apply({"params": params}, x, mutable=["intermediates"])
    ...   updates, state = tx.update(params, state, stats=aux["intermediates"])
    >>> diagnostics = conditioning.diagnose(params, state, aux["intermediates"])
    >>> diagnostics.notes()
    ['the running mean is 2.8 deviations behind']

  Args:
    params: The parameters, or their shapes.
    state: The optimizer's state, which contains that of BNP at any depth.
    stats: The statistics of the forward pass, or the gradients of a model in `Tapped`. A layer that
      is missing there is reported and is not an error.
    eps_relative: As given to `bnp_optax.scale_by_bnp`.
    eps_absolute: As given to `bnp_optax.scale_by_bnp`.
    lag_guard: As given to `bnp_optax.scale_by_bnp`.
    layers: As given to `bnp_optax.scale_by_bnp`.

  Returns:
    A pytree of arrays ``[layers]`` for the layers that BNP preconditions.

  Raises:
    ValueError: While tracing, if there is no state of BNP in `state`, if it does not fit, or if a
      setting is out of range.
  """
  leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, ScaleByBnpState))
  states = [x for x in leaves if isinstance(x, ScaleByBnpState)]
  if not states:
    raise ValueError(
      "diagnose: there is no state of scale_by_bnp or bnp in the optimizer's state, a tree of "
      f"{jax.tree.structure(state)}."
    )
  # A layer that is masked has no leaves. It may belong to another optimizer of a partition.
  means, variances, weights = (
    dict(item for s in states for item in flatten(getattr(s, field)))
    for field in ("input_mean", "input_variance", "input_weight")
  )
  leaves, _ = flatten_masked(params)
  preconditioned = [x for x in find_layers(params, layers) if x.path in means]
  if not preconditioned:
    raise ValueError("diagnose: BNP's state holds statistics for no layer of these parameters.")
  if not by_kernel(stats, LayerStatistics, NoStatistics):
    stats = read_taps(unboxed(stats), has_layers=layers is not None)
  sown = by_kernel(stats, LayerStatistics)
  present = [layer for layer in preconditioned if layer.path in sown]
  matched = match_statistics(present, leaves, stats) if present else []
  batches = {layer.path: x for layer, x in zip(present, matched, strict=True)}
  # The decay and the scale of the layers do not matter here.
  running = RunningStatistics(0.0, eps_relative, eps_absolute, True, lag_guard, True, layers)
  values = [
    layer_values(
      running,
      layer,
      leaves[layer.kernel].shape,
      means[layer.path],
      variances[layer.path],
      batches.get(layer.path),
      debias=layer.path in weights,
    )
    for layer in preconditioned
  ]
  stacked = {name: jnp.stack([value[name] for value in values]) for name in values[0]}
  return Diagnostics(names=tuple(map(str, preconditioned)), **stacked)


def heat_map(history: Diagnostics, quantity: str = "largest_eigenvalue") -> Any:
  """Draw one quantity of every layer over training, with layers down and steps across.

  It needs matplotlib, which the library does not install.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> diagnostics = [...]  # doctest: +SKIP
    >>> history = jax.tree.map(lambda *x: jnp.stack(x), *diagnostics)  # doctest: +SKIP
    >>> conditioning.heat_map(history, "lag").savefig("lag.png")  # doctest: +SKIP

  Args:
    history: A `Diagnostics` whose arrays are ``[steps, layers]``, as `jax.lax.scan` stacks them.
    quantity: Name of one of its arrays.

  Returns:
    A `matplotlib.figure.Figure` with a logarithmic colour scale.

  Raises:
    ValueError: If the arrays have no axis of steps.
  """
  from matplotlib.colors import LogNorm
  from matplotlib.figure import Figure

  values = np.ma.masked_invalid(np.asarray(getattr(history, quantity), np.float64))
  if values.ndim != 2:
    raise ValueError(
      f"heat_map: {quantity} should be [steps, layers], found shape {values.shape}. Stack the "
      "diagnostics of several steps: jax.tree.map(lambda *x: jnp.stack(x), *diagnostics)."
    )
  values = np.ma.masked_less_equal(values, 0)
  figure = Figure(figsize=(8, 1.2 + 0.3 * values.shape[1]), layout="constrained")
  axes = figure.add_subplot()
  norm = LogNorm() if values.count() else None
  image = axes.imshow(values.T, aspect="auto", interpolation="nearest", norm=norm, cmap="cividis")
  axes.set_yticks(range(len(history.names)), history.names)
  axes.set(xlabel="step", title=quantity)
  # matplotlib's own labels of a logarithmic bar overlap where it is shorter than two decades.
  ticks = np.geomspace(values.min(), values.max(), 4) if values.count() else []
  figure.colorbar(image, ax=axes, ticks=ticks, format="%.2g").minorticks_off()
  return figure


def _note(x: Diagnostics, guarded: float) -> str:
  """Describe the problems of one layer from its numbers and the part of the steps guarded."""
  if x.rows == 0:
    return "no statistics, or no rows"
  if np.isnan(x.largest_eigenvalue):
    return "its statistics are not finite"
  notes = []
  if x.dead > x.features / 2:
    notes.append(f"{int(x.dead)} of {int(x.features)} inputs are dead")
  if x.outlier > _OUTLIER:
    notes.append(f"an input's variance is {x.outlier:.1g} times the median")
  if x.largest_eigenvalue > _LARGE_EIGENVALUE * (1 + x.inputs / x.rows):
    if x.inputs * x.lag**2 > x.variance_ratio:
      notes.append(f"the running mean is {x.lag:.2g} deviations behind")
    elif 2 * x.variance_ratio > _LARGE_EIGENVALUE:  # Without a bias, a mean alone makes it large.
      notes.append(f"a second moment is {x.variance_ratio:.2g} times the preconditioner's")
  if x.guard > _LARGE_GUARD:
    notes.append(f"the guard divides the step by {x.guard:.2g}")
  elif _FREQUENT_GUARD < guarded < 1:
    notes.append(f"the guard acts in {guarded:.0%} of the steps: lower the learning rate")
  if x.improvement < 0.99:
    notes.append("BNP raises the condition number")
  return "; ".join(notes)
