"""The Hessian of the loss with respect to one unit's weights, and to its outputs."""

from collections.abc import Callable
import contextlib
import contextvars
import math
from typing import Any

import flax.linen as nn
import jax
from jax.core import Tracer
import jax.numpy as jnp

from bnp_optax._kernels import Layer, Layouts, choose_layer, find_layers
from bnp_optax._patching import activate
from bnp_optax._trees import Path, flatten_masked

# Their outputs are the product and the bias, with the units last.
_LAYERS = (nn.Dense, nn.DenseGeneral, nn.Conv, nn.ConvTranspose)

_perturbation: contextvars.ContextVar[Any] = contextvars.ContextVar("perturbation", default=None)


def unit_hessian(
  loss_fn: Callable[[Any], jax.Array],
  params: Any,
  layer: Path | None = None,
  unit: int = 0,
  *,
  layers: Layouts | None = None,
) -> jax.Array:
  r"""Compute the exact Hessian of the loss with respect to one unit's bias and weights.

  It is :math:`\nabla^2_{\hat w} L = \hat H^T S \hat H` (Propositions 2 and 9), with `hidden_matrix`
  and `unit_curvature`; preconditioned it is :math:`P^T \nabla^2_{\hat w} L \, P` (Theorem 3).

  Examples:
    >>> from bnp_optax import conditioning
    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> model, x = nn.Dense(3), jnp.array([[1.0], [3.0]])
    >>> variables = model.init(jax.random.key(0), x)
    >>> loss_fn = lambda params: jnp.mean(model.apply({"params": params}, x)[:, 1] ** 2)
    >>> conditioning.unit_hessian(loss_fn, variables["params"], unit=1)
    Array([[ 2.,  4.],
           [ 4., 10.]], dtype=float32)

  Args:
    loss_fn: Maps the parameters to the loss, a scalar, with any framework.
    params: The parameters.
    layer: Path of the layer's kernel; None for the only layer of a model.
    unit: Index of the output in the layer's bias, flattened.
    layers: As in `bnp_optax.scale_by_bnp`.

  Returns:
    ``[1 + inputs, 1 + inputs]``, the bias first, then the weights as in `hidden_matrix`.

  Raises:
    ValueError: If the layer or the unit is not found.
  """
  found = choose_layer(find_layers(params, layers), layer)
  leaves, treedef = flatten_masked(params)
  kernel = leaves[found.kernel]
  bias = None if found.bias is None else leaves[found.bias]
  w, b = found.layout.to_canonical(kernel, bias)
  _check_unit(found, unit, kernel.shape)
  entry = divmod(unit, w.shape[-1])

  def loss_of_unit(w_hat: jax.Array) -> jax.Array:
    weights = w_hat if b is None else w_hat[1:]
    new_w = w.at[entry[0], :, :, entry[1]].set(weights.reshape(w.shape[1:3]))
    new_b = None if b is None else b.at[entry].set(w_hat[0])
    new = list(leaves)
    new_w, new_b = found.layout.from_canonical(new_w, new_b, kernel.shape)
    for i, x in ((found.kernel, new_w), (found.bias, new_b)):
      if i is not None and x is not None:
        new[i] = x.reshape(leaves[i].shape)
    return loss_fn(treedef.unflatten(new))

  w_hat = w[entry[0], :, :, entry[1]].ravel()
  if b is not None:
    w_hat = jnp.concatenate([b[entry][None], w_hat])
  return jax.hessian(loss_of_unit)(w_hat)


def unit_curvature(
  loss_fn: Callable[[Any], jax.Array],
  params: Any,
  layer: Path | None = None,
  unit: int = 0,
  *,
  layers: Layouts | None = None,
) -> jax.Array:
  r"""Compute the matrix S: the Hessian of the loss with respect to one unit's outputs.

  .. math::
    S_{ij} = \frac{\partial^2 L}{\partial a_i \partial a_j}, \qquad
    \nabla^2_{\hat w} L = \hat H^T S \hat H

  For a dense layer S is diagonal, :math:`\frac1N L''(a_j)`, if the loss is a mean over examples
  (Proposition 2). For a convolution S has a block for each example (Proposition 9). The loss must
  call the layer once, on the whole batch.

  Examples:
    >>> from bnp_optax import conditioning
    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> model, x = nn.Dense(3), jnp.array([[1.0], [3.0]])
    >>> variables = model.init(jax.random.key(0), x)
    >>> loss_fn = lambda params: jnp.mean(model.apply({"params": params}, x)[:, 1] ** 2)
    >>> S = conditioning.unit_curvature(loss_fn, variables["params"], unit=1)
    >>> H = conditioning.hidden_matrix(model, variables, x)[0]
    >>> H.T @ S @ H
    Array([[ 2.,  4.],
           [ 4., 10.]], dtype=float32)

  Args:
    loss_fn: Maps the parameters to the loss, a scalar. It calls a Linen model.
    params: The parameters.
    layer: Path of the layer's kernel; None for the only layer of a model.
    unit: Index of the output in the layer's bias.
    layers: As in `bnp_optax.scale_by_bnp`.

  Returns:
    ``[rows, rows]``, the rows in the order of `hidden_matrix`.

  Raises:
    ValueError: If the layer or the unit is not found, if it is not a Dense, DenseGeneral, Conv or
      ConvTranspose of one map and one output axis, or if it is not called once (under `jax.vmap`
      or in a loop, this is found only if the parameters are not traced).
  """
  found = choose_layer(find_layers(params, layers), layer)
  leaves, _ = flatten_masked(params)
  if found.layout.stack or len(found.layout.output) > 1:
    raise ValueError(f"Layer {found}: S is defined for a single layer of one output axis.")
  _check_unit(found, unit, leaves[found.kernel].shape)
  calls, runs = [], []

  def record(outputs: jax.Array) -> jax.Array:
    calls.append(jax.ShapeDtypeStruct(outputs.shape[:-1], outputs.dtype))
    # Called for each element of a vmap and each iteration of a scan.
    jax.debug.callback(lambda _: runs.append(None), outputs.ravel()[:1])
    return outputs

  traced = any(isinstance(x, Tracer) for x in leaves)
  with _changed(found.path[:-1], record):
    jax.eval_shape(loss_fn, params) if traced else jax.block_until_ready(loss_fn(params))
  jax.effects_barrier()
  if (count := len(calls) if traced or len(calls) != 1 else len(runs)) != 1:
    raise ValueError(
      f"Layer {found} is called {count} times by the loss instead of once. It must be a Dense, "
      "DenseGeneral, Conv or ConvTranspose of flax.linen in a model that the loss calls on the "
      "whole batch, without jax.vmap and loops."
    )

  def loss_of_outputs(a: jax.Array) -> jax.Array:
    def change(outputs: jax.Array) -> jax.Array:
      return outputs.at[..., unit].add(a.reshape(calls[0].shape))

    with _changed(found.path[:-1], change):
      return loss_fn(params)

  return jax.hessian(loss_of_outputs)(jnp.zeros(calls[0].size, calls[0].dtype))


@contextlib.contextmanager
def _changed(path: Path, change: Callable[[jax.Array], jax.Array]) -> Any:
  """Apply ``change`` to the outputs of a Linen module within this context."""

  def interceptor(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
    outputs = next_fun(*args, **kwargs)
    module, method = context.module, context.method_name
    matches = module.path == path and method == "__call__" and type(module) in _LAYERS
    return change(outputs) if matches and _perturbation.get() is change else outputs

  # The unique key prevents the reuse of functions that were traced without this change.
  with activate(_perturbation, change, object()), nn.intercept_methods(interceptor):
    yield


def _check_unit(layer: Layer, unit: int, kernel_shape: tuple[int, ...]) -> None:
  outputs = math.prod(layer.layout.bias_shape(kernel_shape))
  if not 0 <= unit < outputs:
    raise ValueError(f"Layer {layer}: no unit {unit}; the layer has {outputs} outputs.")
