"""How `flax.linen` layers report what they saw.

Linen calls every method of every module through its interceptors. One of them is enough to sow the
statistics of each layer's inputs beside the layer, with no edit to the model and no change to its
outputs or gradients.
"""

from collections.abc import Callable, Iterator
import contextlib
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bnp_optax._statistics import LayerStatistics, layer_statistics, merge_calls

_NAME = "layer_statistics"


@contextlib.contextmanager
def sow_statistics(*, example_axes: int = 1, mask: jax.Array | None = None) -> Iterator[None]:
  """Within this context, every Dense and Conv sows what it sees into ``intermediates``.

  Each layer called in it sows one `LayerStatistics` of its inputs (paper, eqs. 13, 21 and 22) with
  `flax.linen.Module.sow`; apply the model with ``mutable=["intermediates"]`` to get them, together
  with whatever the model itself sows there. Outputs and gradients of the model stay bitwise the
  same. A layer called several times in one forward pass sees more rows.

  Enter it inside the function that is differentiated and jitted, around the call of the model: a
  function that has been traced already does not know of it.

  Under `flax.linen.scan` and `flax.linen.vmap`, ``variable_axes`` must name ``intermediates``.
  Under `jax.vmap` over examples, each example's statistics come out along the mapped axis: sum
  them over it with `jax.tree.map`.

  Examples:
    >>> import bnp_optax, flax.linen as nn, jax, jax.numpy as jnp
    >>> model = nn.Dense(3)
    >>> x = jnp.arange(8.0).reshape(4, 2)
    >>> params = model.init(jax.random.key(0), x)
    >>> with bnp_optax.linen.sow_statistics():
    ...   y, aux = model.apply(params, x, mutable=["intermediates"])
    >>> stats = aux["intermediates"]["layer_statistics"]
    >>> stats.examples, stats.mean, stats.variance
    (Array(4., dtype=float32), Array([3., 4.], dtype=float32), Array([5., 5.], dtype=float32))

  Args:
    example_axes: how many leading axes count examples, as the loss does: 1 if it is a mean over
      sequences or images, 2 if it is a mean over the tokens of ``[batch, time, features]``.
    mask: True for positions that count and False for padding; its shape is the leading shape of
      the inputs it is for, such as ``[batch, time]``. Layers whose inputs have only the example
      axes, such as a head after pooling, are not masked.

  Yields:
    None.

  Raises:
    ValueError: while tracing, if a layer's inputs have no rows, are complex, or do not fit `mask`.
  """

  def interceptor(
    next_fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
  ) -> Any:
    outputs = next_fun(*args, **kwargs)
    module = context.module
    if context.method_name == "__call__" and isinstance(module, nn.Dense | nn.Conv):
      (inputs,) = args or kwargs.values()
      statistics = _statistics("/".join(module.path), jnp.asarray(inputs), outputs)
      module.sow(
        "intermediates",
        _NAME,
        statistics,
        init_fn=_nothing_seen,
        reduce_fn=_see_again,
      )
    return outputs

  def _statistics(name: str, inputs: jax.Array, outputs: jax.Array) -> LayerStatistics:
    if inputs.size == 0:
      raise ValueError(f"Layer {name}: no rows in its inputs of shape {inputs.shape}: empty batch?")
    if jnp.issubdtype(inputs.dtype, jnp.complexfloating):
      raise ValueError(f"Layer {name}: BNP is defined for real inputs, found {inputs.dtype}.")
    leading = inputs.shape[:-1]
    here = mask
    if here is not None and leading[: here.ndim] != here.shape:
      if len(leading) > example_axes:
        raise ValueError(
          f"Layer {name}: the mask of shape {here.shape} does not fit its inputs of shape "
          f"{inputs.shape}. Its shape must be the leading shape of the inputs."
        )
      here = None
    examples: int | jax.Array = math.prod(leading[:example_axes])
    if here is not None:
      if example_axes >= here.ndim:
        examples = examples // here.size * jnp.sum(here)
      here = jnp.broadcast_to(jnp.expand_dims(here, range(here.ndim, len(leading))), leading)
    return layer_statistics(
      inputs, examples=examples, rows=math.prod(outputs.shape[:-1]), mask=here
    )

  with nn.intercept_methods(interceptor):
    yield


def _nothing_seen() -> LayerStatistics | None:
  return None


def _see_again(seen: LayerStatistics | None, new: LayerStatistics | None) -> LayerStatistics | None:
  return new if seen is None or new is None else merge_calls(seen, new)
