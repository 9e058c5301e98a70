"""The accuracy of bnp(Adam) in a transformer without LayerNorm, where it falls behind Adam.

Measures: the accuracy of the network of `bnp-optax run language-model` without LayerNorm, at batch
size 4 on held-out training sequences, after each of two epochs, one seed: Adam, and bnp(Adam) with
a shorter and a longer memory and with larger epsilons.
Command: `python benchmarks/without_layernorm.py`, two minutes. Needs `bnp_experiments`.
Quoted by: docs/experiments/beyond.md, "Transformers".
"""

import dataclasses

from bnp_experiments import data, methods, training
from bnp_experiments.catalogue import EXPERIMENTS
from bnp_experiments.evaluation import evaluate
import jax
import numpy as np

EPOCHS, BATCH_SIZE, SEED = 2, 4, 0
SETTINGS = (
  (),
  (("decay", 0.9),),
  (("decay", 0.999),),
  (("eps_relative", 0.1),),
  (("eps_relative", 1.0),),
)


def main() -> None:
  """Print the accuracy on held-out sequences after each epoch, in %."""
  dataset = data.load("pydoc")
  order = np.random.default_rng(SEED).permutation(len(dataset.y_train))
  count = len(order) * 9 // 10
  train, held_out = (
    jax.device_put((dataset.x_train[indices], dataset.y_train[indices]))
    for indices in (order[:count], order[count:])
  )

  def report(name: str, method: methods.Method, rate: float) -> None:
    experiment = EXPERIMENTS["language-model"]
    setup = experiment.setup(method, BATCH_SIZE, count, dataset.classes)
    lanes = training.make_lanes([SEED], [rate])
    state = training.init(setup, lanes, train[0])
    accuracy = []
    for epoch in range(1, EPOCHS + 1):
      state, _ = training.train_epoch(setup, state, lanes, epoch, training.Examples(*train))
      accuracy.append(100 * evaluate(setup, state, *held_out).accuracy[0])
    print(f"{name}, rate {rate:g}: {' '.join(f'{x:.1f}' for x in accuracy)}")

  report("Adam", methods.ADAM, 0.001)
  for arguments in SETTINGS:
    method = dataclasses.replace(methods.BNP_ADAM, bnp_arguments=arguments)
    for rate in (0.001, 0.003):
      report(f"bnp(Adam) {dict(arguments) or ''}", method, rate)


if __name__ == "__main__":
  main()
