"""`bnp_optax.nnx.Tapped`: an NNX model whose gradient carries the statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from bnp_optax._calls import Call
from bnp_optax._nnx import describe, is_layer, is_reporting, report_calls
from bnp_optax._taps import TapReporter, check_settings, count_examples, is_tap, name_tap
from bnp_optax._trees import split_arrays


class Tap(nnx.Param[Any]):
  """Variable type of the taps."""


class Tapped(nnx.Module):
  """A model whose gradient carries the statistics of its layers' inputs.

  It is `bnp_optax.linen.Tapped` for NNX, and a module with the model as its attribute ``model``. It
  adds a `Tap` to every linear layer, which it finds by tracing the model once. Calls of
  ``tapped.model`` itself report nothing.

  Examples:
    >>> import bnp_optax, jax, jax.numpy as jnp, optax
    >>> from flax import nnx
    >>> x = jax.random.uniform(jax.random.key(0), (8, 5))
    >>> model = bnp_optax.nnx.Tapped(nnx.Linear(5, 1, rngs=nnx.Rngs(0)), x, examples=8)
    >>> optimizer = nnx.Optimizer(model, bnp_optax.bnp(optax.sgd(0.3)), wrt=nnx.Param)
    >>> @nnx.jit
    ... def step(model, optimizer):
    ...   loss_fn = lambda model: jnp.mean((model(x) - 2.0) ** 2)
    ...   loss, grads = nnx.value_and_grad(loss_fn)(model)
    ...   optimizer.update(model, grads)
    ...   return loss
    >>> for _ in range(100):
    ...   loss = step(model, optimizer)
    >>> bool(loss < 1e-2)
    True

  Args:
    model: The model, to which the taps are added.
    *args: Arguments of the model; arrays may be `jax.ShapeDtypeStruct`.
    examples: As in `bnp_optax.linen.Tapped`.
    example_axes: As in `bnp_optax.linen.Tapped`.
    exact_windows: As in `bnp_optax.linen.sow_statistics`.
    batch_argument: As in `bnp_optax.linen.Tapped`.
    **kwargs: Keyword arguments of the model.

  Raises:
    ValueError: As in `bnp_optax.linen.Tapped`. On creation, if the kernels of a layer are stacked
      along another axis than the first.
  """

  def __init__(
    self,
    model: nnx.Module,
    *args: Any,
    examples: int,
    example_axes: int = 1,
    exact_windows: bool = False,
    batch_argument: int | str | None = None,
    **kwargs: Any,
  ) -> None:
    """Add the taps to the model."""
    check_settings(examples, example_axes)
    self.model = model
    self.examples = examples
    self.example_axes = example_axes
    self.exact_windows = exact_windows
    self.batch_argument = batch_argument
    _add_taps(model, exact_windows, args, kwargs)

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    """Call the model."""
    model: Any = self.model
    # Within sow_statistics and layers, the layers report to those.
    if is_reporting():
      return model(*args, **kwargs)
    graph, taps, rest = nnx.split(model, Tap, ...)
    counted, counts = count_examples(self, nnx.to_pure_dict(taps), args, kwargs)
    taps = jax.tree.map(lambda x: x, taps)
    nnx.replace_by_pure_dict(taps, counted)
    reporter = TapReporter(_find_tap, describe, self.exact_windows, self.example_axes, counts)
    with report_calls(reporter):
      outputs = nnx.merge(graph, taps, rest)(*args, **kwargs)
    reporter.check()
    return outputs


def remove_taps(model: nnx.Module) -> None:
  """Remove the taps that `Tapped` added to a model.

  Args:
    model: The model, or the `Tapped` around it.
  """
  for _, module in [*nnx.iter_modules(model)]:
    for name, x in [*vars(module).items()]:
      if is_tap(x):
        delattr(module, name)


def _find_tap(module: Any, call: Call, make: Callable[[], Any]) -> Any:
  """Return the values of the tap of a module; None if it has none."""
  del make
  tap = getattr(module, name_tap(call), None)
  # nnx.capture adds an attribute of its own to every module.
  return tap and {field: x[...] for field, x in tap.items() if isinstance(x, Tap)}


def _add_taps(
  model: nnx.Module, exact_windows: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
  """Add a tap to every linear layer that a call of the model uses."""
  # Modules of other kinds may refuse a new attribute, such as nnx.bridge.ToNNX.
  modules: list[Any] = [x for _, x in nnx.iter_modules(model) if is_layer(x)]
  arrays, rebuild = split_arrays((args, kwargs))

  def add(module: Any, call: Call, make: Callable[[], Any]) -> None:
    owner, shape = modules[module.tap_index], getattr(module, call.kernel).shape
    outer = getattr(owner, call.kernel).shape
    stack = outer[: len(outer) - len(shape)]
    if outer != (*stack, *shape):
      raise ValueError(
        f"Layer {describe(module, call)} is a part of kernels of shape {outer}. Tapped needs them "
        "stacked along axis 0, as nnx.vmap and nnx.scan do by default."
      )
    shapes = {k: jax.ShapeDtypeStruct((*stack, *x.shape), x.dtype) for k, x in make().items()}
    added[module.tap_index, name_tap(call)] = shapes

  def trace(model: Any, arrays: list[Any]) -> None:
    args, kwargs = rebuild(arrays)
    with report_calls(TapReporter(add, describe, exact_windows)):
      model(*args, **kwargs)

  added: dict[tuple[int, str], dict[str, jax.ShapeDtypeStruct]] = {}
  # A transform calls copies of the modules. They keep static attributes.
  for index, module in enumerate(modules):
    module.tap_index = index
  try:
    nnx.eval_shape(trace, model, arrays)
  finally:
    for module in modules:
      del module.tap_index
  for (index, name), shapes in added.items():
    tap = {field: Tap(jnp.zeros(x.shape, x.dtype)) for field, x in shapes.items()}
    setattr(modules[index], name, nnx.Dict(tap))
