"""Batch Normalization Preconditioning for JAX: normalize the gradients, not the network."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from bnp_optax import conditioning, linen, normalization
from bnp_optax._layers import LayerEntry, Layers
from bnp_optax._layout import KernelLayout
from bnp_optax._running import ScaleByBnpState
from bnp_optax._statistics import LayerStatistics, layer_statistics, merge_calls
from bnp_optax._transform import BnpState, bnp, scale_by_bnp

if TYPE_CHECKING:
  from bnp_optax import nnx
else:
  # Flax does not import NNX by itself. It would add a sixth to the import time of this package.
  def __getattr__(name: str) -> ModuleType:
    if name == "nnx":
      return importlib.import_module("bnp_optax.nnx")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

  def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__version__ = "0.1.0"

__all__ = [
  "BnpState",
  "KernelLayout",
  "LayerEntry",
  "LayerStatistics",
  "Layers",
  "ScaleByBnpState",
  "bnp",
  "conditioning",
  "layer_statistics",
  "linen",
  "merge_calls",
  "nnx",
  "normalization",
  "scale_by_bnp",
]
