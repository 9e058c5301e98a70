"""`survey`: the effect of BNP on the conditioning of each layer, before training."""

import dataclasses
from typing import Any

import numpy as np

from bnp_optax._layers import Layers, plain_table
from bnp_optax.conditioning._matrices import LayerInputs, collect_inputs, columns
from bnp_optax.conditioning._spectrum import Estimate, estimate_condition_number, rounding


@dataclasses.dataclass(frozen=True)
class LayerSurvey:
  """One layer of a `Survey`. A stack of linear maps is represented by the worst one before BNP.

  Attributes:
    name: The layer.
    rows: Number of rows of H.
    inputs: Number of columns of H, without that of the bias.
    before: Condition number of H-hat; NaN if it was not measured.
    after: Condition number of H-hat P.
    error: The larger relative error of the two, as in `Survey`.
  """

  name: str
  rows: int
  inputs: int
  before: float
  after: float
  error: float

  @property
  def improvement(self) -> float:
    """Factor by which BNP lowers the squared condition number, ``(before / after)**2``."""
    return (self.before / self.after) ** 2


@dataclasses.dataclass(frozen=True)
class Survey:
  """The effect of BNP on each layer of a model. Printed, it is a table.

  A condition number with an error of 2 % is at least the number given and at most 2 % more, except
  for two in a million random starts of Lanczos' method. A number without an error is exact.

  Attributes:
    layers: The layers.
    table: All parameters of the model, as `bnp_optax.linen.layers` finds them.
  """

  layers: tuple[LayerSurvey, ...]
  table: Layers

  def __str__(self) -> str:
    """Return the table as plain text, followed by the linear layers that BNP does not cover."""
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
    missing = [f"{'/'.join(x.path)}: {x.note}" for x in self.table.entries if not x.covered]
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
  r"""Predict the effect of BNP on the conditioning of each layer, from one batch.

  The Hessian of one unit is :math:`\hat H^T S \hat H`, preconditioned
  :math:`P^T \hat H^T S \hat H P`. For each layer, `survey` computes :math:`\kappa(\hat H)` and
  :math:`\kappa(\hat H P)`, with the mean and variance of this batch in P. Their squares bound the
  contribution of the layer's inputs to the condition number of its Hessian (Proposition 11). BNP
  does not change the curvature S. A singular value counts as nonzero as in `condition_number`.

  Large layers are estimated by Lanczos' method, with a stated error. A batch of 8 to 32 images is
  enough. The cost grows with the number of rows of H, and with the square of the smaller side of H.

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
    model: A Linen module, or the graph definition of an NNX module from `flax.nnx.split`, as in
      ``survey(*nnx.split(model), x)``.
    variables: Variables of the Linen module, or the state from `flax.nnx.split`.
    *args: Arguments of the model: a batch.
    eps_relative: As in `bnp_optax.scale_by_bnp`.
    eps_absolute: As in `bnp_optax.scale_by_bnp`.
    **kwargs: Keyword arguments of the model.

  Returns:
    The layers and their condition numbers.

  Raises:
    ValueError: If BNP covers no layer of the model, or if inputs of a layer are not finite.
  """
  table, layers = collect_inputs(model, variables, args, kwargs)
  return Survey(tuple(_survey(x, eps_relative, eps_absolute) for x in layers), table)


def _survey(inputs: LayerInputs, eps_1: float, eps_2: float) -> LayerSurvey:
  layout, shape = inputs.layer.layout, inputs.shape
  name, bias = str(inputs.layer), inputs.layer.bias is not None
  if inputs.H is None:
    features = layout.statistics_shape(shape)[-1] // layout.groups
    rows = int(np.max(np.asarray(inputs.statistics.rows)))
    return LayerSurvey(name, rows, layout.window_size(shape) * features, np.nan, np.nan, 0.0)
  variance = inputs.statistics.variance if bias else inputs.statistics.mean_square
  mu, sigma = columns(inputs.statistics.mean, variance, shape, layout, eps_1, eps_2)
  mu = mu if bias else 0 * mu
  h, mu, sigma = np.asarray(inputs.H), *(np.asarray(x, np.float64) for x in (mu, sigma))
  pairs = [_estimates(*x, bias) for x in zip(h, mu, sigma, strict=True)]
  before, after = max(pairs, key=lambda pair: np.nan_to_num(pair[0].value))
  (_, rows, width), error = h.shape, max(before.error, after.error)
  return LayerSurvey(name, rows, width, before.value, after.value, error)


def _estimates(
  h: np.ndarray, mu: np.ndarray, sigma: np.ndarray, bias: bool
) -> tuple[Estimate, Estimate]:
  """Estimate the condition number of one linear map before and after BNP."""
  threshold = rounding(h)
  h = h.astype(np.float64)
  e = np.ones((len(h), int(bias)))
  return (
    estimate_condition_number(np.hstack([e, h]), threshold),
    estimate_condition_number(np.hstack([e, (h - mu) / sigma]), threshold),
  )
