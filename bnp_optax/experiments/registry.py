"""All experiments there are."""

from bnp_optax.experiments import beyond, section5
from bnp_optax.experiments.experiment import Experiment

_ALL = (*beyond.FIRST, *section5.ALL, *beyond.LATER)
EXPERIMENTS: dict[str, Experiment] = {experiment.name: experiment for experiment in _ALL}
