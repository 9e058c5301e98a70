"""All experiments there are."""

from bnp_optax.experiments import beyond, section5, section5_resnets
from bnp_optax.experiments.experiment import Experiment

_ALL = (
  *beyond.FIRST,
  *section5.UP_TO_FIGURE_5,
  *section5_resnets.ALL,
  *section5.FROM_FIGURE_8,
  *beyond.LATER,
)
EXPERIMENTS: dict[str, Experiment] = {experiment.name: experiment for experiment in _ALL}
