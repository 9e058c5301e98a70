r"""The paper's theory as functions: what BNP does to a network's conditioning, and how it fares.

For one unit of a layer, with its bias and weights :math:`\hat w = [b, w]`, the Hessian of the loss
is :math:`\hat H^T S \hat H` (Propositions 2 and 9), BNP changes it to
:math:`P^T \hat H^T S \hat H P` (Theorem 3), and gradient descent converges at a rate that its
condition number sets (Theorem 1). Here are these matrices, of any layer that BNP covers, and two
tools made of them: `survey` says before training what BNP would do to each layer of a model,
`diagnose` says during training how each layer fares.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bnp_optax._diagnostics import Diagnostics, diagnose, heat_map
from bnp_optax._hessian import choose_layer, unit_curvature, unit_hessian
from bnp_optax._layers import Path
from bnp_optax._layout import KernelLayout
from bnp_optax._rows import columns, observe
from bnp_optax._spectrum import condition_number
from bnp_optax._survey import LayerSurvey, Survey, survey

__all__ = [
  "Diagnostics",
  "LayerSurvey",
  "Preconditioner",
  "Survey",
  "condition_number",
  "diagnose",
  "heat_map",
  "hidden_matrix",
  "preconditioner",
  "survey",
  "unit_curvature",
  "unit_hessian",
]


class Preconditioner(NamedTuple):
  """The factors of P = U D (eq. 12), ``[stack, 1 + inputs, 1 + inputs]`` each.

  Attributes:
    U: centres: ``[[1, -mu^T], [0, I]]``.
    D: scales: ``diag(1, 1 / sigma)``.
  """

  U: jax.Array
  D: jax.Array


def hidden_matrix(
  model: Any, variables: Any, *args: Any, layer: Path | None = None, **kwargs: Any
) -> jax.Array:
  r"""The extended hidden variable matrix of a layer, :math:`\hat H = [e, H]` (eqs. 11 and 18).

  Its rows are what each output is a product with: :math:`\hat a = \hat H \hat w`, where :math:`a`
  are the outputs of one unit, and :math:`\hat w` its bias and weights. A dense layer has a row for
  each example, or for each position of each example; a convolution has a row for each output
  position, which holds the window of inputs under the kernel (Lemma 8).

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
    model: a Linen module; or, of an NNX one, the graph definition that `flax.nnx.split` gives.
    variables: its variables; or the state that `flax.nnx.split` gives.
    *args: what the model is called with; batches lead.
    layer: the path of the layer's kernel, as in ``bnp_optax.linen.layers(model, *args)``. None for
      the only one of a model.
    **kwargs: what it is called with by keyword.

  Returns:
    ``[stack, rows, 1 + inputs]``, in the units of the layer's inputs, with the inputs of a window
    in the order (window, feature). The stack is one but for grouped convolutions, batched dense
    layers and layers under scan or vmap. A layer without a bias has no column :math:`e`.

  Raises:
    ValueError: if the layer is not found, or is a transposed convolution with circular padding.

  References:
    Lange, Helfrich, Ye, JMLR 23(72), 2022: Proposition 2 and Lemma 8.
  """
  _, observed = observe(model, variables, args, kwargs)
  found = {x.layer.path: x for x in observed}
  seen = found[choose_layer([x.layer for x in observed], layer).path]
  if seen.rows is None:
    raise ValueError(
      f"Layer {seen.layer}: the windows of a circular transposed convolution are not formed."
    )
  if seen.layer.bias is None:
    return seen.rows
  return jnp.concatenate([jnp.ones_like(seen.rows[..., :1]), seen.rows], axis=-1)


def preconditioner(
  mean: jax.Array,
  variance: jax.Array,
  kernel_shape: tuple[int, ...],
  layout: KernelLayout | None = None,
  *,
  bias: bool = True,
  eps_relative: float = 1e-2,
  eps_absolute: float = 1e-4,
) -> Preconditioner:
  r"""BNP's preconditioner of a layer as matrices, :math:`P = U D` (eqs. 12 and 23).

  .. math::
    U = \begin{bmatrix} 1 & -\mu^T \\ 0 & I \end{bmatrix}, \qquad
    D = \begin{bmatrix} 1 & 0 \\ 0 & \mathrm{diag}(1/\tilde\sigma) \end{bmatrix}, \qquad
    \tilde\sigma^2 = \sigma^2 + \epsilon_1 \max(\sigma^2) + \epsilon_2

  What `bnp_optax.scale_by_bnp` applies is :math:`P P^T / q^2`; the number :math:`q` changes no
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
    mean: the layer's mean: its leaf of ``input_mean`` in the state, or `LayerStatistics.mean`.
    variance: its variance, likewise; for a layer without bias `LayerStatistics.mean_square`.
    kernel_shape: the shape of its kernel.
    layout: the layout of its kernel; None for a plain Dense or Conv.
    bias: whether the layer has one. Without, U is the identity and both matrices lack the first row
      and column.
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
  return Preconditioner(U, identity * scale[:, None, :])
