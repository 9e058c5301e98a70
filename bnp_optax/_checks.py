"""Checks of the arguments of the transformations."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from bnp_optax._layout import KernelLayout


def check_range(name: str, value: ArrayLike, top: float) -> None:
  """Raise TypeError if a value is not a number, and ValueError if it is not in [0, top)."""
  if callable(value) or isinstance(value, str | tuple):
    raise TypeError(
      f"{name} must be a number, got {value!r}. For a schedule pass "
      f"optax.inject_hyperparams(bnp_optax.scale_by_bnp)({name}=schedule); to run another "
      "optimizer in BNP's coordinates, bnp_optax.bnp(optimizer)."
    )
  dtype = getattr(value, "dtype", None)
  if dtype is not None and jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
    raise ValueError(
      f"{name} is {dtype}, in which 0.999 is 1. optax.inject_hyperparams casts to the dtype of "
      "the parameters: give it hyperparam_dtype=jnp.float32."
    )
  try:
    in_range = 0 <= float(value) < top  # pyright: ignore[reportArgumentType]
  except jax.errors.ConcretizationTypeError:
    return  # A traced value, as inject_hyperparams passes.
  if not in_range:
    raise ValueError(f"{name} must be in [0, {top:g}), got {value}.")


def check_layouts(layers: Any) -> None:
  """Raise TypeError if ``layers`` is neither None nor a mapping of paths to layouts."""
  if layers is None or (
    isinstance(layers, Mapping)
    and all(isinstance(path, tuple) for path in layers)
    and all(isinstance(layout, KernelLayout) for layout in layers.values())
  ):
    return
  raise TypeError(
    "layers= must map the path of each kernel, a tuple of names, to its KernelLayout. Pass "
    "bnp_optax.linen.layers(model, *inputs), bnp_optax.nnx.layers(model, *inputs), or for example "
    f'{{("dense", "w"): KernelLayout(bias="b")}}; got {layers!r}.'
  )
