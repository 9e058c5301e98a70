"""Batch Normalization Preconditioning for JAX: normalize the gradients, not the network."""

from bnp_optax import conditioning, linen, nnx
from bnp_optax._coordinates import BnpState, bnp
from bnp_optax._statistics import LayerStatistics
from bnp_optax._transform import ScaleByBnpState, scale_by_bnp

__version__ = "0.1.0"

__all__ = [
  "BnpState",
  "LayerStatistics",
  "ScaleByBnpState",
  "bnp",
  "conditioning",
  "linen",
  "nnx",
  "scale_by_bnp",
]
