"""The catalogue of all experiments."""

from bnp_experiments.catalogue import beyond, resnets, section5
from bnp_experiments.experiment import Experiment

_ALL = (
  *beyond.FIRST,
  *section5.UP_TO_FIGURE_5,
  *resnets.ALL,
  *section5.FROM_FIGURE_8,
  *beyond.LATER,
)
EXPERIMENTS: dict[str, Experiment] = {experiment.name: experiment for experiment in _ALL}
