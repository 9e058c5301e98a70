"""`bnp_optax.linen.Tapped`: a Linen model whose gradient carries the statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import flax.linen as nn

from bnp_optax._calls import Call
from bnp_optax._linen import is_sowing, report_calls
from bnp_optax._taps import TapReporter, check_settings, count_examples, name_tap
from bnp_optax._trees import show_path


@dataclasses.dataclass(kw_only=True, eq=False)
class Tapped:
  """A model whose gradient carries the statistics of its layers' inputs.

  It is for training loops that compute the gradient and call the optimizer themselves, so that
  there is no place to pass ``stats=``. Give the loop ``Tapped(model, examples=...)`` in place of
  the model, or its ``init`` and ``apply``, and `bnp_optax.bnp` or `bnp_optax.scale_by_bnp` as the
  optimizer.

  ``init`` adds a tap beside each kernel, a dictionary of zeros. ``apply`` computes the same outputs
  and the same gradients as the model. The gradient of a tap is defined to be the statistics, times
  a number so small that they do not count in a global norm. An optimizer of BNP reads them, if it
  is given no ``stats``, and leaves the taps at zero.

  The statistics are right where gradients are added or averaged, over micro-batches, devices or
  time steps, and where they are scaled or clipped by their global norm. A layer whose outputs do
  not reach the loss has no rows.

  Examples:
    >>> import bnp_optax, flax.linen as nn, jax, jax.numpy as jnp, optax
    >>> from flax.training.train_state import TrainState
    >>> x = jax.random.uniform(jax.random.key(0), (8, 5))
    >>> model = bnp_optax.linen.Tapped(nn.Dense(1), examples=8)
    >>> state = TrainState.create(
    ...   apply_fn=model.apply,
    ...   params=model.init(jax.random.key(1), x)["params"],
    ...   tx=bnp_optax.bnp(optax.sgd(0.3)),
    ... )
    >>> @jax.jit
    ... def step(state):  # It has no line about BNP.
    ...   loss_fn = lambda params: jnp.mean((state.apply_fn({"params": params}, x) - 2.0) ** 2)
    ...   loss, grads = jax.value_and_grad(loss_fn)(state.params)
    ...   return state.apply_gradients(grads=grads), loss
    >>> for _ in range(100):
    ...   state, loss = step(state)
    >>> bool(loss < 1e-2)
    True

    Add taps to parameters that were trained without:

    >>> params = nn.Dense(1).init(jax.random.key(1), x)["params"]
    >>> _, variables = model.apply({"params": params}, x, mutable=["params"])
    >>> sorted(variables["params"])
    ['bias', 'kernel', 'tap']

  Attributes:
    model: The model.
    examples: Number of examples that the loss of one update is a mean over, those of all devices
      and micro-batches together.
    example_axes: Number of leading axes of the first array that ``apply`` is given that count
      examples: 1 for a mean over sequences or images, 2 for a mean over the tokens of ``[batch,
      time]``, 0 if `jax.vmap` maps single examples.
    exact_windows: As in `bnp_optax.linen.sow_statistics`.
    batch_argument: Position or name of the argument of the model whose first array counts the
      examples, for a model that takes other arrays, such as the state of a recurrent layer, before
      its batch; None for the first array of all arguments.

  Raises:
    ValueError: If `examples` is not a number of at least 1, or `example_axes` is negative. From
      ``apply``, while tracing, if no argument has the example axes, if arrays and layers disagree
      about the number of examples, or if the taps are not float32 or float64.
  """

  model: nn.Module = dataclasses.field(kw_only=False)
  examples: int
  example_axes: int = 1
  exact_windows: bool = False
  batch_argument: int | str | None = None

  def __post_init__(self) -> None:
    """Raise ValueError for numbers out of range."""
    check_settings(self.examples, self.example_axes)

  def __getattr__(self, name: str) -> Any:
    """Return any other attribute of the model."""
    return getattr(object.__getattribute__(self, "model"), name)

  def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the variables that ``model.init`` returns, and a tap beside each kernel."""
    return self._add_taps(self.model.init, rngs, *args, **kwargs)

  def init_with_output(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
    """Return what ``model.init_with_output`` returns, with a tap beside each kernel."""
    return self._add_taps(self.model.init_with_output, rngs, *args, **kwargs)

  def lazy_init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the variables that ``model.lazy_init`` returns, and a tap beside each kernel."""
    return self._add_taps(self.model.lazy_init, rngs, *args, **kwargs)

  def bind(self, *args: Any, **kwargs: Any) -> Any:
    """Raise ValueError: the calls of a bound model would not be counted."""
    raise ValueError("Tapped: a model that is bound reports nothing. Use apply(..., method=...).")

  def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Return what ``model.apply`` returns. Layers without a tap in `variables` report nothing."""
    # Within sow_statistics, the layers report to it.
    if is_sowing():
      return self.model.apply(variables, *args, **kwargs)
    counted = {name: x for name, x in kwargs.items() if name != "rngs"}
    params, counts = count_examples(self, variables.get("params", {}), args, counted)
    reporter = self._reporter(counts)
    with report_calls(reporter):
      outputs = self.model.apply({**variables, "params": params}, *args, **kwargs)
    reporter.check()
    return outputs

  def _add_taps(self, init: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if is_sowing():
      return init(*args, **kwargs)
    with report_calls(self._reporter()):
      return init(*args, **kwargs)

  def _reporter(self, *counts: Any) -> TapReporter:
    settings = self.exact_windows, self.example_axes, *counts
    return TapReporter(_find_tap, lambda module, _: show_path(module.path), *settings)


def _find_tap(module: Any, call: Call, make: Callable[[], Any]) -> Any:
  """Return the tap of a module, which is added to parameters that are mutable."""
  scope, name = module.scope, name_tap(call)
  if not scope.has_variable("params", name) and scope.is_mutable_collection("params"):
    scope.put_variable("params", name, make())
  return scope.get_variable("params", name)
