"""`survey`: what BNP would do to the conditioning of each layer of a model, before training."""

import dataclasses
from typing import Any

import numpy as np

from bnp_optax._layers import Layers
from bnp_optax._rows import Observed, columns, observe
from bnp_optax._spectrum import Estimate, estimate_condition_number, rounding
from bnp_optax._table import plain_table


@dataclasses.dataclass(frozen=True)
class LayerSurvey:
  """One layer of a `Survey`. Of a stack of linear maps, the one worst before BNP counts.

  Attributes:
    name: the layer.
    rows: the number of rows of H.
    inputs: its number of columns, without the bias's.
    before: the condition number of H-hat; NaN if it was not measured.
    after: that of H-hat P.
    error: the larger relative error of the two, as in `Survey`.
  """

  name: str
  rows: int
  inputs: int
  before: float
  after: float
  error: float

  @property
  def improvement(self) -> float:
    """By how much the condition number of the Hessian's factor falls, ``(before / after)**2``."""
    return (self.before / self.after) ** 2


@dataclasses.dataclass(frozen=True)
class Survey:
  """What BNP would do to each layer of a model; printed, it is a table.

  A condition number with an error of 2 % is at least the number given, and at most 2 % more, but
  for one in a million random starts of Lanczos' method; without one it is exact.

  Attributes:
    layers: its layers.
    table: all parameters of the model, as `bnp_optax.linen.layers` finds them.
  """

  layers: tuple[LayerSurvey, ...]
  table: Layers

  def __str__(self) -> str:
    """The table, as plain text; below it the linear layers that BNP does not cover, and why."""
    lines = [("layer", "rows", "inputs", "kappa(H)", "kappa(H P)", "improvement", "error")]
    lines += [
      (
        x.name,
        str(x.rows),
        str(x.inputs),
        *(("not measured", "", "") if np.isnan(x.before) else _numbers(x)),
        f"{100 * x.error:.1f} %" if x.error else "",
      )
      for x in self.layers
    ]
    missing = [f"{'/'.join(x.path)}: {x.note}" for x in self.table.rows if not x.covered]
    return "\n".join([plain_table(lines, right=lines[0][1:]), *missing])

  __repr__ = __str__


def _numbers(x: LayerSurvey) -> tuple[str, str, str]:
  return f"{x.before:.3g}", f"{x.after:.3g}", f"{x.improvement:.3g}x"


def survey(
  model: Any,
  variables: Any,
  *args: Any,
  eps_relative: float = 1e-2,
  eps_absolute: float = 1e-4,
  **kwargs: Any,
) -> Survey:
  r"""Says what BNP would do to the conditioning of each layer, from one batch, without training.

  The Hessian of one unit is :math:`\hat H^T S \hat H`, preconditioned
  :math:`P^T \hat H^T S \hat H P`. For each layer this gives :math:`\kappa(\hat H)` and
  :math:`\kappa(\hat H P)`, with the mean and variance of this batch in P. Their squares bound what
  the layer's inputs contribute to the condition number of its Hessian (Proposition 11); the
  curvature S is none of BNP's making. A singular value counts as nonzero as in `condition_number`.

  Large layers are estimated by Lanczos' method, with a stated error. A batch of 8 to 32 images is
  enough; the cost grows with the rows of H, and with the square of the smaller side of H.

  Examples:
    >>> from bnp_optax import conditioning
    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> model = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(4)])
    >>> x = jax.random.normal(jax.random.key(0), (64, 8)) * jnp.logspace(0, -2, 8) + 3.0
    >>> variables = model.init(jax.random.key(1), x)
    >>> result = conditioning.survey(model, variables, x)
    >>> [layer.name for layer in result.layers]
    ['layers_0', 'layers_2']
    >>> result.layers[0].before > 10 * result.layers[0].after
    True

  Args:
    model: a Linen module; or, of an NNX one, the graph definition that `flax.nnx.split` gives, as
      in ``survey(*nnx.split(model), x)``.
    variables: its variables; or the state that `flax.nnx.split` gives.
    *args: what the model is called with: a batch.
    eps_relative: as in `bnp_optax.scale_by_bnp`.
    eps_absolute: as in `bnp_optax.scale_by_bnp`.
    **kwargs: what it is called with by keyword.

  Returns:
    The layers and their condition numbers.

  Raises:
    ValueError: if BNP covers no layer of the model, or if inputs of a layer are not finite.
  """
  table, observed = observe(model, variables, args, kwargs)
  return Survey(tuple(_survey(x, eps_relative, eps_absolute) for x in observed), table)


def _survey(seen: Observed, eps_1: float, eps_2: float) -> LayerSurvey:
  layout, shape = seen.layer.layout, seen.shape
  bias = seen.layer.bias is not None
  nan = float("nan")
  if seen.rows is None:
    features = layout.statistics_shape(shape)[-1] // layout.groups
    rows = int(np.max(np.asarray(seen.statistics.rows)))
    return LayerSurvey(str(seen.layer), rows, layout.window_size(shape) * features, nan, nan, 0.0)
  variance = seen.statistics.variance if bias else seen.statistics.mean_square
  mu, sigma = columns(seen.statistics.mean, variance, shape, layout, eps_1, eps_2)
  mu = mu if bias else 0 * mu
  h, mu, sigma = np.asarray(seen.rows), *(np.asarray(x, np.float64) for x in (mu, sigma))
  pairs = [_estimates(*x, bias) for x in zip(h, mu, sigma, strict=True)]
  before, after = max(pairs, key=lambda pair: np.nan_to_num(pair[0].value))
  return LayerSurvey(
    str(seen.layer),
    h.shape[1],
    h.shape[2],
    before.value,
    after.value,
    max(before.error, after.error),
  )


def _estimates(
  h: np.ndarray, mu: np.ndarray, sigma: np.ndarray, bias: bool
) -> tuple[Estimate, Estimate]:
  """Before and after, of one linear map."""
  threshold = rounding(h)
  h = h.astype(np.float64)
  e = np.ones((len(h), int(bias)))
  return (
    estimate_condition_number(np.hstack([e, h]), threshold),
    estimate_condition_number(np.hstack([e, (h - mu) / sigma]), threshold),
  )
