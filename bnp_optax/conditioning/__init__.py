r"""The paper's theory as functions, and two tools that apply it to a model.

For one unit of a layer, with its bias and weights :math:`\hat w = [b, w]`, the Hessian of the loss
is :math:`\hat H^T S \hat H` (Propositions 2 and 9). BNP changes it to
:math:`P^T \hat H^T S \hat H P` (Theorem 3). The condition number of the Hessian determines the rate
of convergence of gradient descent (Theorem 1). This package computes these matrices for any layer
that BNP covers. `survey` predicts, before training, the effect of BNP on the conditioning of each
layer of a model. `diagnose` reports the problems of each layer during training.
"""

from bnp_optax.conditioning._diagnostics import Diagnostics, diagnose, heat_map
from bnp_optax.conditioning._hessian import unit_curvature, unit_hessian
from bnp_optax.conditioning._matrices import PreconditionerFactors, hidden_matrix, preconditioner
from bnp_optax.conditioning._spectrum import condition_number
from bnp_optax.conditioning._survey import LayerSurvey, Survey, survey

__all__ = [
  "Diagnostics",
  "LayerSurvey",
  "PreconditionerFactors",
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
