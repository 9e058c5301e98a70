"""The matrices H and P of every layer of a model that BNP covers, from one forward pass."""

from collections.abc import Callable
import dataclasses
import math
from typing import Any, NamedTuple

import flax.linen
import jax
import jax.numpy as jnp

from bnp_optax import _preconditioner, linen
from bnp_optax._calls import Call
from bnp_optax._kernels import Layer, choose_layer, find_layers
from bnp_optax._layers import Layers
from bnp_optax._layout import KernelLayout
from bnp_optax._matching import match_statistics
from bnp_optax._reporting import Reporter
from bnp_optax._statistics import LayerStatistics, accumulation_dtype
from bnp_optax._trees import Path, by_kernel, flatten_masked, split_arrays


def hidden_matrix(
  model: Any, variables: Any, *args: Any, layer: Path | None = None, **kwargs: Any
) -> jax.Array:
  r"""Return the extended hidden variable matrix of a layer, :math:`\hat H = [e, H]`.

  The outputs :math:`a` of one unit are :math:`\hat a = \hat H \hat w`, with :math:`\hat w` its bias
  and weights (eqs. 11 and 18). A dense layer has a row for each example, or for each position of
  each example. A convolution has a row for each output position, which holds the window of inputs
  under the kernel (Lemma 8).

  Examples:
    >>> from bnp_optax import conditioning
    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> model = nn.Conv(8, (3,))
    >>> x = jnp.arange(1.0, 6.0).reshape(1, 5, 1)
    >>> variables = model.init(jax.random.key(0), x)
    >>> conditioning.hidden_matrix(model, variables, x)[0]
    Array([[1., 0., 1., 2.],
           [1., 1., 2., 3.],
           [1., 2., 3., 4.],
           [1., 3., 4., 5.],
           [1., 4., 5., 0.]], dtype=float32)

  Args:
    model: A Linen module, or the graph definition of an NNX module from `flax.nnx.split`.
    variables: Variables of the Linen module, or the state from `flax.nnx.split`.
    *args: Arguments of the model; batches lead.
    layer: Path of the layer's kernel, as in ``bnp_optax.linen.layers(model, *args)``. None for the
      only layer of a model.
    **kwargs: Keyword arguments of the model.

  Returns:
    ``[stack, rows, 1 + inputs]``, in the units of the layer's inputs, with the inputs of a window
    in the order (window, feature). The stack is 1 except for grouped convolutions, batched dense
    layers and layers under scan or vmap. A layer without a bias has no column :math:`e`.

  Raises:
    ValueError: If the layer is not found, or is a transposed convolution with circular padding.

  References:
    Lange, Helfrich, Ye, JMLR 23(72), 2022: Proposition 2 and Lemma 8.
  """
  _, inputs = collect_inputs(model, variables, args, kwargs)
  by_path = {x.layer.path: x for x in inputs}
  found = by_path[choose_layer([x.layer for x in inputs], layer).path]
  if found.H is None:
    raise ValueError(
      f"Layer {found.layer}: hidden_matrix does not support circular transposed convolutions."
    )
  if found.layer.bias is None:
    return found.H
  return jnp.concatenate([jnp.ones_like(found.H[..., :1]), found.H], axis=-1)


class PreconditionerFactors(NamedTuple):
  """The factors of P = U D (eq. 12), ``[stack, 1 + inputs, 1 + inputs]`` each.

  Attributes:
    U: Centres: ``[[1, -mu^T], [0, I]]``.
    D: Scales: ``diag(1, 1 / sigma)``.
  """

  U: jax.Array
  D: jax.Array


def preconditioner(
  mean: jax.Array,
  variance: jax.Array,
  kernel_shape: tuple[int, ...],
  layout: KernelLayout | None = None,
  *,
  bias: bool = True,
  eps_relative: float = 1e-2,
  eps_absolute: float = 1e-4,
) -> PreconditionerFactors:
  r"""Return BNP's preconditioner of a layer as matrices, :math:`P = U D` (eqs. 12 and 23).

  .. math::
    U = \begin{bmatrix} 1 & -\mu^T \\ 0 & I \end{bmatrix}, \qquad
    D = \begin{bmatrix} 1 & 0 \\ 0 & \mathrm{diag}(1/\tilde\sigma) \end{bmatrix}, \qquad
    \tilde\sigma^2 = \sigma^2 + \epsilon_1 \max(\sigma^2) + \epsilon_2

  `bnp_optax.scale_by_bnp` applies :math:`P P^T / q^2`. The number :math:`q` does not change any
  condition number.

  Examples:
    >>> from bnp_optax import conditioning
    >>> import jax.numpy as jnp
    >>> mean, variance = jnp.array([3.0, -1.0]), jnp.array([4.0, 0.25])
    >>> U, D = conditioning.preconditioner(mean, variance, (2, 5), eps_relative=0, eps_absolute=0)
    >>> (U @ D)[0]
    Array([[ 1. , -1.5,  2. ],
           [ 0. ,  0.5,  0. ],
           [ 0. ,  0. ,  2. ]], dtype=float32)

  Args:
    mean: Mean of the layer's inputs: its leaf of ``input_mean`` in the state, or
      `LayerStatistics.mean`.
    variance: Their variance: its leaf of ``input_variance``, or `LayerStatistics.variance`; for a
      layer without bias `LayerStatistics.mean_square`.
    kernel_shape: Shape of the kernel.
    layout: Layout of the kernel; None for a plain Dense or Conv.
    bias: Whether the layer has a bias. Without one, U is the identity and both matrices lack the
      first row and column.
    eps_relative: :math:`\epsilon_1`; 0 with `eps_absolute` 0 for equation 12 itself.
    eps_absolute: :math:`\epsilon_2`.

  Returns:
    U and D, both ``[stack, 1 + inputs, 1 + inputs]``, their inputs in the order of `hidden_matrix`.

  References:
    Lange, Helfrich, Ye, JMLR 23(72), 2022: equations 12, 15 and 23.
  """
  layout = KernelLayout.by_convention(len(kernel_shape)) if layout is None else layout
  mu, sigma = columns(mean, variance, kernel_shape, layout, eps_relative, eps_absolute)
  scale = 1 / sigma
  if bias:
    mu = jnp.pad(mu, ((0, 0), (1, 0)))
    scale = jnp.pad(scale, ((0, 0), (1, 0)), constant_values=1)
  identity = jnp.broadcast_to(jnp.eye(mu.shape[1], dtype=mu.dtype), (len(mu), *2 * mu.shape[1:]))
  U = identity.at[:, 0].add(-mu) if bias else identity
  return PreconditionerFactors(U, identity * scale[:, None, :])


def columns(
  mean: jax.Array,
  variance: jax.Array,
  kernel_shape: tuple[int, ...],
  layout: KernelLayout,
  eps_relative: float,
  eps_absolute: float,
) -> tuple[jax.Array, jax.Array]:
  """Return mean and regularized deviation of the columns of H, ``[stack, window * feature]``."""
  mu, sigma2 = (layout.statistics_to_canonical(x, kernel_shape) for x in (mean, variance))
  one, window = jnp.ones((), mu.dtype), layout.window_size(kernel_shape)
  eps = (jnp.asarray(x, mu.dtype) for x in (eps_relative, eps_absolute))
  p = _preconditioner.make_preconditioner(mu, sigma2, window, one, one, *eps)
  shape = len(mu), window, mu.shape[-1]
  mu, sigma = (jnp.broadcast_to(x, shape).reshape(len(mu), -1) for x in (p.mu, p.sigma))
  return mu, sigma


class LayerInputs(NamedTuple):
  """One layer, the shape of its kernel, and its inputs in one forward pass."""

  layer: Layer
  shape: tuple[int, ...]
  H: jax.Array | None  # [stack, rows, window * feature]; None for circular transposed convolutions.
  statistics: LayerStatistics  # Mean and variance that BNP would take from this batch.


def collect_inputs(
  model: Any, variables: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Layers, list[LayerInputs]]:
  """Return the table of a model, and the inputs of its layers in the order of the parameters.

  The arguments are those of `hidden_matrix`. Raise ValueError if BNP covers no layer of the model.
  """
  framework = _linen if isinstance(model, flax.linen.Module) else _nnx
  params, layers, call = framework(model, variables, args, kwargs)
  found = find_layers(params, layers)
  if not found:
    raise ValueError(f"BNP covers no layer of this model:\n{layers}")
  arrays, rebuild = split_arrays((args, kwargs))

  @jax.jit
  def run(variables: Any, arrays: list[Any]) -> tuple[Any, Any]:
    args, kwargs = rebuild(arrays)
    return call(variables, *args, **kwargs)

  matrices, statistics = run(variables, arrays)
  leaves, _ = flatten_masked(params)
  matched = match_statistics(found, leaves, statistics)
  by_path: dict[Path, _Matrix] = by_kernel(matrices, _Matrix)
  inputs = []
  for layer, stats in zip(found, matched, strict=True):
    matrix = by_path.get(layer.path)
    H = None if matrix is None else _without_outer_axes(matrix.H, layer.layout.calls)
    inputs.append(LayerInputs(layer, leaves[layer.kernel].shape, H, stats))
  return layers, inputs


def _linen(
  model: flax.linen.Module, variables: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Layers, Callable[..., tuple[Any, Any]]]:
  """Return a Linen module's parameters, table, and function that gives matrices and statistics."""

  def call(variables: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    variables = {k: v for k, v in variables.items() if k != "intermediates"}
    # Both passes use the same random numbers. A condition number does not depend on examples=.
    rngs = {"params": jax.random.key(0)}
    with linen.report_calls(_MATRICES):
      _, matrices = model.apply(variables, *args, mutable=True, rngs=rngs, **kwargs)
    with linen.sow_statistics(examples=1):
      _, statistics = model.apply(variables, *args, mutable=True, rngs=rngs, **kwargs)
    return matrices.get("intermediates", {}), statistics["intermediates"]

  if "params" not in variables:
    raise ValueError(f"Give variables, as in {{'params': params}}; found {sorted(variables)}.")
  params = flax.linen.meta.unbox(variables["params"])
  return params, linen.layers(model, *args, **kwargs), call


def _nnx(
  model: Any, variables: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Layers, Callable[..., tuple[Any, Any]]]:
  """Return the same for an NNX module."""
  # Imported here because NNX takes long to import and Linen does not need it.
  from flax import nnx

  from bnp_optax.nnx import Statistics, layers, report_calls, sow_statistics

  if not isinstance(model, nnx.GraphDef):
    raise ValueError(
      "Give a Linen module with its variables, or the two parts of an NNX module, as in "
      f"conditioning.survey(*nnx.split(model), x); found a {type(model).__name__}."
    )

  def call(variables: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    found: list[Any] = []
    for context in (report_calls(_MATRICES), sow_statistics(examples=1)):
      with context:
        module = nnx.merge(model, variables, copy=True)  # Both passes start from the same state.
        found.append(nnx.capture(module, Statistics)(*args, **kwargs)[1])
    return found[0], found[1]

  module: Any = nnx.merge(model, variables)
  return nnx.state(module, nnx.Param), layers(module, *args, **kwargs), call


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Matrix:
  """The matrix H of a layer, ``[*outer, stack, rows, entries]``; scan and vmap add outer axes."""

  H: jax.Array
  kernel: str = dataclasses.field(metadata={"static": True})


def _record(_: Any, call: Call) -> _Matrix | None:
  """Return the matrix of one call; None for a circular transposed convolution."""
  if call.problem or (call.layout.window and not call.layout.exact_windows):
    return None
  stack = call.inputs.shape[len(call.leading) : -1]
  shape = math.prod(call.leading), math.prod(stack), call.layout.groups, -1
  h = call.inputs.astype(accumulation_dtype(call.inputs.dtype)).reshape(shape)
  h = h.transpose(1, 2, 0, 3).reshape(-1, shape[0], h.shape[-1])
  return _Matrix(h, call.kernel)


_MATRICES = Reporter(
  _record,
  merge=lambda a, b: dataclasses.replace(a, H=jnp.concatenate([a.H, b.H], -2)),
  exact_windows=True,
  leave=lambda a, axis: dataclasses.replace(a, H=jnp.concatenate(a.H, -2)) if axis is None else a,
  covers_nested=True,
  needs_windows=True,
)


def _without_outer_axes(H: jax.Array, calls: tuple[int, ...]) -> jax.Array:
  """Merge repeated calls into the rows, and the other outer axes into the stack."""
  outer = [axis for axis in range(H.ndim - 3) if axis not in calls]
  H = H.transpose(*outer, H.ndim - 3, *calls, H.ndim - 2, H.ndim - 1)
  return H.reshape(math.prod(H.shape[: len(outer) + 1]), -1, H.shape[-1])
