"""The effect of late running averages on the accuracy of BatchNorm in Figure 3 right.

Measures: the accuracy of the network of `bnp-optax run fig3-right` at batch size 60 after each
epoch, with the running averages of BatchNorm (momentum 0.99), and with averages over 20,000
training images at the current weights.
Command: `python benchmarks/running_averages.py`, two minutes. Needs `bnp_experiments` and CIFAR-10.
Quoted by: docs/experiments/claims.md, "Figure 3 right: batch size 60".
"""

from typing import Any

from bnp_experiments import data, methods, training
from bnp_experiments.catalogue import EXPERIMENTS
from bnp_experiments.evaluation import evaluate
import jax
import numpy as np

EPOCHS, BATCH_SIZE, AVERAGED_OVER, MOMENTUM = 20, 60, 20_000, 0.99


def main() -> None:
  """Print the accuracy after each epoch, in %."""
  dataset = data.load("cifar10")
  train = jax.device_put((dataset.x_train, dataset.y_train))
  test = jax.device_put((dataset.x_test, dataset.y_test))
  experiment = EXPERIMENTS["fig3-right"]
  setup = experiment.setup(methods.BATCHNORM, BATCH_SIZE, len(dataset.y_train), dataset.classes)

  @jax.jit
  def averages(params: Any, model_state: Any, images: jax.Array) -> Any:
    variables, inputs = {"params": params, **model_state}, training.as_inputs(images)
    _, moved = setup.model.apply(variables, inputs, train=True, mutable=["batch_stats"])
    # Solve one update of the running averages for the averages of these images.
    return jax.tree.map(
      lambda new, old: (new - MOMENTUM * old) / (1 - MOMENTUM), moved, model_state
    )

  for rate in (0.1, 0.5):
    lanes = training.make_lanes([1], [rate])
    state = training.init(setup, lanes, train[0])
    late, current = [], []
    for epoch in range(1, EPOCHS + 1):
      state, _ = training.train_epoch(setup, state, lanes, epoch, training.Examples(*train))
      params, model_state = jax.tree.map(lambda x: x[0], state[:2])
      averaged = averages(params, model_state, train[0][:AVERAGED_OVER])
      with_current = state._replace(model_state=jax.tree.map(lambda x: x[None], averaged))
      late.append(100 * evaluate(setup, state, *test).accuracy[0])
      current.append(100 * evaluate(setup, with_current, *test).accuracy[0])
    for name, values in (("running averages", late), ("averages at the current weights", current)):
      print(f"rate {rate:g}, {name}: {' '.join(f'{x:.1f}' for x in values)}")
      print(
        f"  last ten: {np.mean(values[-10:]):.1f} ({min(values[-10:]):.1f}-{max(values[-10:]):.1f})"
      )


if __name__ == "__main__":
  main()
