"""`diagnose`: how each layer fares during training, from the statistics alone."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bnp_optax._layers import by_kernel, flatten
from bnp_optax._matching import Layouts, find_layers, flatten_masked, match_statistics
from bnp_optax._prediction import layer_values
from bnp_optax._statistics import LayerStatistics
from bnp_optax._table import plain_table
from bnp_optax._transform import ScaleByBnpState

_LARGE_EIGENVALUE = 10.0
_OUTLIER = 1e4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Diagnostics:
  r"""How each layer fares at one step; printed, it is a table.

  Every array is ``[layers]``, float32, in the order of ``names``; of a stack of linear maps, the
  worst one counts. Below, :math:`\mu, \tilde\sigma` are the preconditioner's mean and deviation,
  :math:`\mu_H, \sigma_H^2` those of the batch.

  Attributes:
    rows: the number of rows of H in the batch; 0 if the layer's statistics are missing.
    features: the number of features.
    inputs: the number of inputs of one output: window times features of a group.
    dead: the number of features that are constant over the batch.
    spread: the largest over the smallest of the variances :math:`\sigma_H^2` that are not zero.
    outlier: the largest of these variances over their median. Where it is above 100, the paper's
      :math:`\epsilon_1` keeps P from normalizing most features.
    kappa_D: :math:`\kappa(D)` of the preconditioner's :math:`D = \mathrm{diag}(1, 1/\tilde\sigma)`.
    lag: how far the running mean is from the batch's, in standard deviations: the root mean square
      of :math:`\delta = (\mu_H - \mu) / \tilde\sigma` over the features.
    variance_ratio: the largest :math:`\sigma_H^2 / \tilde\sigma^2`. Above 1 the running variance
      is too small for this batch; below, it has not come down yet from the 1 that it starts with,
      and the layer's steps will still grow by as much.
    largest_eigenvalue: the predicted largest eigenvalue of
      :math:`P^T \hat H^T \hat H P / \text{rows}`, were the features uncorrelated. It is 1 if the
      statistics are those of the batch; a lag alone makes it :math:`1 + n \delta^2` or up to 1
      more, where :math:`n` counts the inputs of one output.
    q2: the paper's :math:`q^2`.
    improvement: by how much P lowers the condition number of :math:`\hat H^T \hat H`, were the
      features uncorrelated. Below 1, BNP does harm.
    names: the layers.
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
  improvement: jax.Array
  names: tuple[str, ...] = dataclasses.field(metadata={"static": True})

  def notes(self) -> list[str]:
    """What is wrong with each layer, in words; empty where nothing is.

    It names layers that were not seen or whose statistics are not finite; more than half of whose
    inputs are dead; with an outlier above 1e4; with a largest eigenvalue above 10 times what the
    noise of a batch's own mean makes it, 1 + inputs / rows; and those to which BNP does harm.
    """
    values = {f.name: np.asarray(getattr(self, f.name)) for f in dataclasses.fields(self)[:-1]}
    return [
      _note(**{name: float(value[i]) for name, value in values.items()})
      for i in range(len(self.names))
    ]

  def __str__(self) -> str:
    """The table, as plain text."""
    columns = (
      "spread",
      "kappa_D",
      "lag",
      "variance_ratio",
      "largest_eigenvalue",
      "q2",
      "improvement",
    )
    lines: list[tuple[str, ...]] = [("layer", "rows", "dead", *columns, "")]
    for i, (name, note) in enumerate(zip(self.names, self.notes(), strict=True)):
      dead = "-" if np.isnan(self.dead[i]) else f"{int(self.dead[i])}/{int(self.features[i])}"
      values = (float(getattr(self, column)[i]) for column in columns)
      numbers = ("-" if np.isnan(x) else f"{x:.3g}" for x in values)
      lines.append((name, f"{float(self.rows[i]):.0f}", dead, *numbers, note))
    return plain_table(lines, right=lines[0][1:-1])


def diagnose(
  params: Any,
  state: Any,
  stats: Any,
  *,
  eps_relative: jax.typing.ArrayLike = 1e-2,
  eps_absolute: jax.typing.ArrayLike = 1e-4,
  layers: Layouts | None = None,
) -> Diagnostics:
  r"""Says how each layer fares, from BNP's state and the statistics of one batch.

  Call it in the training step, after ``update``, with what ``update`` was given and returned. It is
  traced like the step, works under `jax.jit` and `jax.lax.scan`, and costs O(features) a layer.

  Examples:
    >>> import bnp_optax, flax.linen as nn, jax, jax.numpy as jnp
    >>> from bnp_optax import conditioning
    >>> model = nn.Dense(3)
    >>> x = jax.random.normal(jax.random.key(0), (64, 5)) + 10.0
    >>> params = model.init(jax.random.key(1), x)["params"]
    >>> with bnp_optax.linen.sow_statistics():
    ...   _, aux = model.apply({"params": params}, x, mutable=["intermediates"])
    >>> tx = bnp_optax.scale_by_bnp()
    >>> updates, state = tx.update(params, tx.init(params), stats=aux["intermediates"])
    >>> diagnostics = conditioning.diagnose(params, state, aux["intermediates"])
    >>> diagnostics.notes()
    ['the running mean is 9.8 deviations behind']

  Args:
    params: the parameters, or their shapes.
    state: the optimizer's state, however deep BNP's own lies in it.
    stats: the statistics of the forward pass. A layer that is missing there is reported, not an
      error.
    eps_relative: as given to `bnp_optax.scale_by_bnp`.
    eps_absolute: as given to `bnp_optax.scale_by_bnp`.
    layers: as given to `bnp_optax.scale_by_bnp`.

  Returns:
    A pytree of arrays ``[layers]`` for the layers that BNP preconditions.

  Raises:
    ValueError: while tracing, if there is no state of BNP in `state`, or if it does not fit.
  """
  leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, ScaleByBnpState))
  states = [x for x in leaves if isinstance(x, ScaleByBnpState)]
  if not states:
    raise ValueError(
      "diagnose: no state of scale_by_bnp or bnp in the optimizer's state, a tree of "
      f"{jax.tree.structure(state)}."
    )
  means, variances = (
    {
      path: x
      for s in states
      for path, x in flatten(getattr(s, field), optax.MaskedNode)
      # Another optimizer of a partition may have the layer.
      if not isinstance(x, optax.MaskedNode)
    }
    for field in ("input_mean", "input_variance")
  )
  leaves, _ = flatten_masked(params)
  preconditioned = [x for x in find_layers(params, layers) if x.path in means]
  if not preconditioned:
    raise ValueError("diagnose: BNP's state holds statistics for no layer of these parameters.")
  sown = by_kernel(stats, LayerStatistics)
  present = [layer for layer in preconditioned if layer.path in sown]
  matched = match_statistics(present, leaves, stats) if present else []
  seen = {layer.path: x for layer, x in zip(present, matched, strict=True)}
  values = [
    layer_values(
      layer,
      leaves[layer.kernel].shape,
      means[layer.path],
      variances[layer.path],
      seen.get(layer.path),
      eps_relative,
      eps_absolute,
    )
    for layer in preconditioned
  ]
  stacked = {name: jnp.stack([value[name] for value in values]) for name in values[0]}
  return Diagnostics(names=tuple(map(str, preconditioned)), **stacked)


def heat_map(history: Diagnostics, quantity: str = "largest_eigenvalue") -> Any:
  """Draws one quantity of every layer over training: a row a layer, a column a step.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> diagnostics = [...]  # doctest: +SKIP
    >>> history = jax.tree.map(lambda *x: jnp.stack(x), *diagnostics)  # doctest: +SKIP
    >>> conditioning.heat_map(history, "lag").savefig("lag.png")  # doctest: +SKIP

  Args:
    history: a `Diagnostics` whose arrays are ``[steps, layers]``, as `jax.lax.scan` stacks them.
    quantity: the name of one of its arrays.

  Returns:
    A `matplotlib.figure.Figure`, its colours on a logarithmic scale.

  Raises:
    ValueError: if the arrays have no axis of steps.
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
  axes.set_xlabel("step")
  figure.colorbar(image, ax=axes, label=quantity)
  return figure


def _note(
  *,
  rows: float,
  features: float,
  inputs: float,
  dead: float,
  outlier: float,
  lag: float,
  variance_ratio: float,
  largest_eigenvalue: float,
  improvement: float,
  **_: float,
) -> str:
  if rows == 0:
    return "not seen: no statistics, or no rows"
  if np.isnan(largest_eigenvalue):
    return "its statistics are not finite"
  notes = []
  if dead > features / 2:
    notes.append(f"{int(dead)} of {int(features)} inputs are dead")
  if outlier > _OUTLIER:
    notes.append(f"an input's variance is {outlier:.1g} times the median")
  if largest_eigenvalue > _LARGE_EIGENVALUE * (1 + inputs / rows):
    if inputs * lag**2 > variance_ratio:
      notes.append(f"the running mean is {lag:.2g} deviations behind")
    else:
      notes.append(f"a variance is {variance_ratio:.2g} times the preconditioner's")
  if improvement < 1:
    notes.append("the preconditioner does harm")
  return "; ".join(notes)
