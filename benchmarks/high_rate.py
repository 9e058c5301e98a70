"""Train at a learning rate that is too high, with each start of the running statistics.

The CNN of the paper, the first 10,000 images of CIFAR-10, batch size 128, SGD, rate 0.5.

`compare` measures the mean training loss of four epochs and the largest loss of a step for each
start, from two seeds. `follow` takes the paper's start and the first seed, for ten epochs or until
a loss above 100. It records the loss and the diagnostics of each step, and at each fortieth step
the largest eigenvalue of the preconditioned Hessian of the batch, by 20 steps of the power method.
Then it trains again from 100 steps before the end, with half the rate and with a decay of 0.9.
`report` prints the tables of the page from the records, and `figure` draws its picture.

Command: `python benchmarks/high_rate.py compare follow report figure`, 20 minutes. Needs
`bnp_experiments` and CIFAR-10.
Quoted by: docs/diagnostics.md, "A run that diverged".
"""

import argparse
import functools
import json
import pathlib
from typing import Any

from bnp_experiments import data, models
from bnp_experiments.training import as_inputs
from common import cross_entropy
import jax
import numpy as np
import optax
from tables import append, head, read, row

import bnp_optax
from bnp_optax import conditioning

RATE, COUNT, BATCH, EPOCHS = 0.5, 10_000, 128, 4
FOLLOWED_EPOCHS, BLOWN_UP, BACK = 10, 100.0, 100
HERE = pathlib.Path(__file__).parent
RECORDS = HERE / "records" / "high_rate.jsonl"
PICTURE = HERE.parent / "docs" / "diagnostics.png"
LAYERS = ("conv1", "conv2", "conv3", "dense1", "dense2")


def optimizers() -> dict[str, Any]:
  """Return BNP with SGD for each start of the running statistics."""
  bounded = optax.chain(optax.sgd(RATE), optax.adaptive_grad_clip(0.03))
  return {
    "the paper's start": bnp_optax.bnp(optax.sgd(RATE), debias=False),
    "debias": bnp_optax.bnp(optax.sgd(RATE)),
    "debias, lag_guard=2": bnp_optax.bnp(optax.sgd(RATE), lag_guard=2.0),
    "debias, bounded step": bnp_optax.bnp(bounded),
  }


@functools.cache
def load() -> tuple[Any, Any, Any]:
  """Return the network, the images and the labels."""
  dataset = data.load("cifar10")
  return models.CNN(), dataset.x_train[:COUNT], dataset.y_train[:COUNT].astype(np.int32)


def initialize(seed: int) -> Any:
  """Return the initial parameters."""
  model, x, _ = load()
  return model.init(jax.random.key(seed), as_inputs(x[:1]), train=False)["params"]


def batches(seed: int, epochs: int) -> Any:
  """Yield the indices of each batch."""
  for epoch in range(epochs):
    order = np.random.default_rng(1000 * seed + epoch).permutation(COUNT)
    yield from order[: COUNT // BATCH * BATCH].reshape(-1, BATCH)


def make_loss_fn(x: Any, y: Any) -> Any:
  """Return the loss on a batch as a function of the parameters, with the statistics."""
  model, *_ = load()
  return lambda params: cross_entropy(model, {"params": params}, as_inputs(x), y, train=True)


def make_step(tx: Any) -> Any:
  """Return a compiled step from parameters, state and a batch to the next, loss and diagnostics."""

  @jax.jit
  def step(params: Any, state: Any, x: Any, y: Any) -> tuple[Any, Any, Any, Any]:
    loss_fn = make_loss_fn(x, y)
    (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, state = tx.update(grads, state, params, stats=stats)
    diagnostics = conditioning.diagnose(params, state, stats)
    return optax.apply_updates(params, updates), state, loss, diagnostics

  return step


def make_power_step(tx: Any) -> Any:
  """Return a compiled product of the preconditioned Hessian and a vector, as direction and norm.

  The product is with ``P P^T Hessian``, which has the eigenvalues of ``P^T Hessian P``.
  """

  @jax.jit
  def multiply(v: Any, params: Any, state: Any, x: Any, y: Any) -> tuple[Any, Any]:
    gradient = jax.grad(make_loss_fn(x, y), has_aux=True)
    _, v, stats = jax.jvp(gradient, (params,), (v,), has_aux=True)
    updates, _ = tx.update(v, state, params, stats=stats)
    norm = optax.tree.norm(updates)
    return optax.tree.scale(-1 / norm, updates), norm / RATE

  return multiply


def compare() -> None:
  """Record the losses of each start, for two seeds."""
  _remove("start")
  _, x, y = load()
  for seed in range(2):
    for name, tx in optimizers().items():
      step, params, losses = make_step(tx), initialize(seed), []
      state = tx.init(params)
      for indices in batches(seed, EPOCHS):
        params, state, loss, _ = step(params, state, x[indices], y[indices])
        losses.append(float(loss))
      epochs = np.reshape(losses, (EPOCHS, -1)).mean(axis=1).tolist()
      _append({"start": name, "seed": seed, "epochs": epochs, "largest": max(losses)})


def follow() -> None:
  """Record each step of the run with the paper's start, and the two remedies."""
  _remove("step", "remedy")
  _, x, y = load()
  tx, params = optimizers()["the paper's start"], initialize(0)
  step, multiply, state, kept = make_step(tx), make_power_step(tx), tx.init(params), []
  for count, indices in enumerate(batches(0, FOLLOWED_EPOCHS), start=1):
    kept = [*kept[-BACK:], (params, state)]
    hessian = {}
    if count % 40 == 0:
      v = jax.tree.map(lambda p: jax.random.normal(jax.random.key(0), p.shape), params)
      for _ in range(20):
        v, norm = multiply(v, params, state, x[indices], y[indices])
      hessian = {"hessian": float(norm)}
    params, state, loss, diagnostics = step(params, state, x[indices], y[indices])
    notes = [f"{n}: {note}" for n, note in zip(LAYERS, diagnostics.notes(), strict=True) if note]
    eigenvalues = np.asarray(diagnostics.largest_eigenvalue, float).round(3).tolist()
    record = {"step": count, "loss": float(loss), "eigenvalues": eigenvalues, "notes": notes}
    record["variance_ratio"] = round(float(diagnostics.variance_ratio.max()), 3)
    _append(record | hessian)
    if not loss < BLOWN_UP:
      break
  for name, rate, decay in (("half the rate", RATE / 2, 0.99), ("decay 0.9", RATE, 0.9)):
    tx = bnp_optax.bnp(optax.sgd(rate), debias=False, decay=decay)
    (params, state), losses = kept[0], []
    step = make_step(tx)
    for indices in list(batches(0, FOLLOWED_EPOCHS))[count - len(kept) : count + BACK]:
      params, state, loss, _ = step(params, state, x[indices], y[indices])
      losses.append(float(loss))
    first, last = count - len(kept) + 1, count - len(kept) + len(losses)
    _append({"remedy": name, "from": first, "to": last, "losses": np.round(losses, 4).tolist()})


def _remove(*kinds: str) -> None:
  """Remove the records of these kinds: those with one of these fields."""
  kept = [record for record in read(RECORDS) if not record.keys() & {*kinds}]
  RECORDS.write_text("")
  append(RECORDS, *kept)


def _append(record: dict[str, Any]) -> None:
  append(RECORDS, record)
  print(json.dumps(record)[:160], flush=True)


def read_kind(records: pathlib.Path, kind: str) -> list[dict[str, Any]]:
  """Return the records of a kind: those with this field."""
  return [record for record in read(records) if kind in record]


def report(records: pathlib.Path) -> None:
  """Print the tables of the page."""
  steps = read_kind(records, "step")
  noted = [i for i, record in enumerate(steps) if record["notes"]]
  shown = {*range(39, len(steps), 40), *range(len(steps) - 5, len(steps)), *noted[:3]}
  print(head(["step", "loss", *LAYERS, "notes"], "rrrrrrrl"))
  for record in (steps[i] for i in sorted(shown)):
    numbers = [f"{x:,.0f}" if x >= 1000 else f"{x:.3g}" for x in record["eigenvalues"]]
    names = ", ".join(note.split(":")[0] for note in record["notes"])
    print(row([str(record["step"]), f"{record['loss']:.3g}", *numbers, names]))
  hessian = "largest eigenvalue of the preconditioned Hessian"
  print("\n" + head(["step", hessian, "`variance_ratio`"]))
  for record in steps[39::40]:
    print(f"| {record['step']} | {record['hessian']:.3g} | {record['variance_ratio']:.3g} |")
  print("\n" + head(["start", "seed", "epochs 1 to 4", "largest"], "lrl"))
  for r in read_kind(records, "start"):
    epochs = ", ".join(f"{loss:.3g}" for loss in r["epochs"])
    print(f"| {r['start']} | {r['seed']} | {epochs} | {r['largest']:.3g} |")
  print("\n| from step | | largest loss | mean of the last ten |\n| --: | --- | --: | --: |")
  for r in read_kind(records, "remedy"):
    last = np.mean(r["losses"][-10:])
    print(f"| {r['from']} | {r['remedy']} | {max(r['losses']):.3g} | {last:.3g} |")


def figure(records: pathlib.Path) -> None:
  """Draw the loss above the predicted eigenvalues."""
  import matplotlib.pyplot as plt

  steps = read_kind(records, "step")
  count = [record["step"] for record in steps]
  fig, (above, below) = plt.subplots(
    2, 1, figsize=(8, 5.5), sharex=True, layout="constrained", height_ratios=[2, 3]
  )
  above.plot(count, [record["loss"] for record in steps], color="black", linewidth=1.2)
  above.set(yscale="log", ylabel="loss")
  colours = ("#A6A6A6", "#56B4E9", "#009E73", "#D55E00", "#0072B2")
  for name, colour, values in zip(
    LAYERS, colours, np.transpose([record["eigenvalues"] for record in steps]), strict=True
  ):
    below.plot(count, values, color=colour, label=name, linewidth=1.2)
  measured = [(record["step"], record["hessian"]) for record in steps if "hessian" in record]
  below.plot(*zip(*measured, strict=True), "kx", label="preconditioned Hessian, measured")
  below.axhline(2 / RATE, color="black", linestyle=":", linewidth=1, label="2 / rate")
  below.set(yscale="log", xlabel="step", ylabel="largest eigenvalue")
  for axes in (above, below):
    for record in steps:
      if record["notes"]:
        axes.axvline(record["step"], color="#D55E00", alpha=0.15, linewidth=2, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E6E6E6", linewidth=0.6)
  fig.legend(loc="outside lower center", ncols=7, frameon=False, fontsize=8)
  fig.savefig(PICTURE, dpi=150, facecolor="white")


def main() -> None:
  """Read the command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  commands = {"compare": compare, "follow": follow}
  commands |= {f.__name__: functools.partial(f, RECORDS) for f in (report, figure)}
  parser.add_argument("commands", nargs="+", choices=commands)
  for command in parser.parse_args().commands:
    commands[command]()


if __name__ == "__main__":
  main()
