"""Batch Normalization Preconditioning for JAX: normalize the gradients, not the network."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from bnp_optax import conditioning, linen, normalization
from bnp_optax._coordinates import BnpState, bnp
from bnp_optax._statistics import LayerStatistics
from bnp_optax._transform import ScaleByBnpState, scale_by_bnp

if TYPE_CHECKING:
  from bnp_optax import nnx
else:
  # Flax itself does not import NNX, which adds a sixth to the time that all other imports take.
  def __getattr__(name: str) -> ModuleType:
    if name == "nnx":
      return importlib.import_module("bnp_optax.nnx")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

  def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__version__ = "0.1.0"

__all__ = [
  "BnpState",
  "LayerStatistics",
  "ScaleByBnpState",
  "bnp",
  "conditioning",
  "linen",
  "nnx",
  "normalization",
  "scale_by_bnp",
]
