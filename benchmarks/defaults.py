"""Compare settings of BNP over networks, batch sizes and optimizers, to select the defaults.

Each cell is a network, a batch size and an optimizer. The networks are FC 100-100-100 and
CNN 32-64-32 of the paper, a vision transformer and a language model, the last two with and without
LayerNorm. In each cell every setting trains with seven learning rates and three seeds. The accuracy
of a setting in a cell is the mean over the seeds at its best rate, on held-out examples.

The settings of BNP are the paper's start of the running statistics; `debias`; `debias` with
`lag_guard=2`; and `debias` with a bound on the step in z, `optax.adaptive_grad_clip(0.03)`. The
optimizer alone is measured in a part of the cells.

The rule for the defaults, written before the runs: the default is the one of the first three
settings with the highest mean over all cells, unless it is below the paper's start in some cell by
more than the range over the seeds of the paper's start there. A bound on the step is a part of the
inner optimizer and cannot be a default.

Variants of `debias` do not compete for the default: a decay of 0.9, 0.95 and 0.999, a linear
warm-up of the learning rate over the first tenth of the steps, and `scale_layers=False` (q = 1).

The images are 18,000 of CIFAR-10 to train on and 2,000 held out; the text is Python's language
reference, of which the last tenth is held out. A learning rate is constant. `run` does not use the
test images. `test` trains FC and CNN with SGD and Adam from five other seeds, alone and with BNP's
defaults, with the learning rates that `run` selected, and computes the accuracy on the test images
of CIFAR-10.

Commands: `python benchmarks/defaults.py pack examples.npz` on a machine with CIFAR-10; on the
accelerator `python benchmarks/defaults.py run benchmarks/records/defaults.jsonl --examples
examples.npz --workers 12`; then `test` in place of `run`, and `python benchmarks/defaults.py report
benchmarks/records/defaults.jsonl`. `run` and `test` continue where they stopped. Needs
`bnp_experiments`.
Quoted by: docs/experiments/start.md.
"""

import argparse
from collections.abc import Callable, Iterator
import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import time
from typing import Any, NamedTuple

import numpy as np

SEEDS = (1, 2, 3)
TEST_SEEDS = (4, 5, 6, 7, 8)
TESTED = list(itertools.product(("fc", "cnn"), (60, 1, 512), ("sgd", "adam"), ("alone", "debias")))
BATCH_SIZES = (60, 1, 512, 6, 128, 16, 2)
# Number of steps of FC and CNN, and of the transformers.
STEPS = {1: (1000, 600), 2: (1000, 600), 6: (1000, 600), 16: (600, 600)}
STEPS |= {60: (400, 400), 128: (200, 200), 512: (100, 100)}
NETWORKS = {
  "fc": "FC",
  "cnn": "CNN",
  "vit": "ViT",
  "vit-plain": "ViT without LayerNorm",
  "lm": "LM",
  "lm-plain": "LM without LayerNorm",
}
RATES = {
  "sgd": (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
  "momentum": (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
  "adam": (0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03),
  "muon": (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
}
OPTIMIZER_NAMES = {"sgd": "SGD", "momentum": "momentum", "adam": "Adam", "muon": "Muon"}
# Settings that train as lanes of one program, as pairs of lag_guard and the bound on the step. An
# infinite constant turns either off.
CORRECTED = {
  "debias": (math.inf, math.inf),
  "debias, lag_guard=2": (2.0, math.inf),
  "debias, bounded step": (math.inf, 0.03),
}
# Variants of debias, as pairs of the decay and the part of the steps for the warm-up.
VARIANTS = {
  "decay 0.9": (0.9, 0.0),
  "decay 0.95": (0.95, 0.0),
  "decay 0.999": (0.999, 0.0),
  "warm-up": (0.99, 0.1),
}
PROGRAMS = {
  "variants": VARIANTS,
  "q = 1": {"q = 1": (math.inf, math.inf)},
  "corrected": CORRECTED,
  "paper": {"paper": (math.inf, math.inf)},
  "alone": {"alone": (math.inf, math.inf)},
}
# Bounds the memory: the lanes of convolutional networks and transformers train in parts.
EXAMPLES_AT_ONCE = 2_000
_EVALUATED_AT_ONCE = 50
# More programs at once would only take turns on the device. The other workers compile meanwhile.
_PROGRAMS_AT_ONCE = 5
_turns: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()


class Cell(NamedTuple):
  """One program: the settings of one name in `PROGRAMS`, for all rates and seeds."""

  program: str
  batch_size: int
  network: str
  optimizer: str


class Lane(NamedTuple):
  """One training run: a learning rate, the two numbers of a setting, and a seed."""

  rate: Any
  setting: Any
  seed: Any


def cells() -> Iterator[Cell]:
  """List the cells, those that decide first."""
  for programs in (("corrected", "paper"), ("alone",), ("variants",), ("q = 1",)):
    for batch_size, optimizer, network in itertools.product(BATCH_SIZES, RATES, NETWORKS):
      for program in programs:
        yield Cell(program, batch_size, network, optimizer)


def pack(path: pathlib.Path) -> None:
  """Write the examples to one file, small enough to travel."""
  from bnp_experiments import data

  images, text = data.load("cifar10"), data.load("pydoc")
  chosen = np.random.default_rng(0).permutation(len(images.y_train))[:20_000]
  x = images.x_train[chosen]
  # Differences of neighbours compress better; they wrap around and lose nothing.
  x[:, :, 1:] -= x[:, :, :-1].copy()
  np.savez_compressed(path, x=x, y=images.y_train[chosen], text_x=text.x_train, text_y=text.y_train)


@functools.cache
def examples(path: pathlib.Path, network: str) -> tuple[Any, Any, Any, Any]:
  """Return the training and the held-out examples of a network, on the device."""
  import jax

  with np.load(path) as file:
    if network.startswith("lm"):
      x, y = file["text_x"], file["text_y"]
    else:
      x, y = np.cumsum(file["x"], axis=2, dtype=np.uint8), file["y"]
  last = len(x) // 10
  return jax.device_put((x[:-last], y[:-last], x[-last:], y[-last:]))


@functools.cache
def model_and_parameters(path: pathlib.Path, network: str) -> tuple[Any, Any]:
  """Return a network and its initial parameters for each seed."""
  from bnp_experiments import models, transformers
  from bnp_experiments.training import as_inputs
  import flax.linen as nn
  import jax

  # Other convolutions are slow under vmap over kernels, and on a CPU in a loop.
  convolve = models.convolve_by_product
  norm = None if network.endswith("plain") else lambda train: nn.LayerNorm()
  model = {
    "fc": models.MLP(),
    "cnn": models.CNN(convolve=convolve),
    "vit": transformers.ViT(norm=norm, convolve=convolve),
    "lm": transformers.LanguageModel(norm=norm),
  }[network.removesuffix("-plain")]
  x = as_inputs(examples(path, network)[0][:1])
  init = jax.jit(lambda seed: model.init(jax.random.key(seed), x, train=False)["params"])
  parameters = [init(seed) for seed in SEEDS]
  return model, jax.tree.map(lambda *leaves: np.stack(leaves), *parameters)


def make_optimizer(cell: Cell, lane: Lane, layers: Any) -> Any:
  """Return the optimizer of a lane."""
  import jax.numpy as jnp
  import optax

  import bnp_optax

  rate = lane.rate
  if cell.program == "variants":
    steps = _count_steps(cell) * lane.setting[1]
    rate = lambda count: lane.rate * jnp.minimum((count + 1) / jnp.maximum(steps, 1), 1)  # noqa: E731
  inner = {
    "sgd": optax.sgd,
    "momentum": functools.partial(optax.sgd, momentum=0.9),
    "adam": optax.adam,
    "muon": optax.contrib.muon,
  }[cell.optimizer](rate)
  if cell.program == "alone":
    return optax.with_extra_args_support(inner)
  if cell.program == "defaults":
    return bnp_optax.bnp(inner, layers=layers)
  if cell.program == "paper":
    return bnp_optax.bnp(inner, debias=False, lag_guard=None, layers=layers)
  if cell.program == "variants":
    return bnp_optax.bnp(inner, decay=lane.setting[0], layers=layers)
  if cell.program == "q = 1":
    return bnp_optax.bnp(inner, scale_layers=False, layers=layers)
  guard, bound = lane.setting
  inner = optax.chain(inner, optax.adaptive_grad_clip(bound))
  return bnp_optax.bnp(inner, debias=True, lag_guard=guard, layers=layers)


def _count_steps(cell: Cell) -> int:
  return STEPS[cell.batch_size][cell.network[:2] in ("vi", "lm")]


def take_step(model: Any, tx: Any, carry: Any, x: Any, y: Any) -> Any:
  """Take one step from parameters and optimizer state."""
  from bnp_experiments.training import as_inputs
  import jax
  import jax.numpy as jnp
  import optax

  import bnp_optax

  params, state = carry

  def loss_fn(params: Any) -> tuple[Any, Any]:
    with bnp_optax.linen.sow_statistics(example_axes=y.ndim):
      logits, aux = model.apply(
        {"params": params}, as_inputs(x), train=True, mutable=["intermediates"]
      )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y.astype(jnp.int32))
    return losses.mean(), aux["intermediates"]

  grads, stats = jax.grad(loss_fn, has_aux=True)(params)
  updates, state = tx.update(grads, state, params, stats=stats)
  return optax.apply_updates(params, updates), state


def make_run(cell: Cell, model: Any, layers: Any) -> Callable[..., Any]:
  """Return a function that trains one lane and computes its accuracy on the held-out examples."""
  from bnp_experiments.training import as_inputs
  import jax
  import jax.numpy as jnp

  def run(lane: Lane, parameters: Any, orders: Any, data: tuple[Any, Any, Any, Any]) -> Any:
    params = jax.tree.map(lambda x: x[lane.seed], parameters)
    tx = make_optimizer(cell, lane, layers)

    def step(carry: Any, indices: Any) -> tuple[Any, None]:
      return take_step(model, tx, carry, data[0][indices], data[1][indices]), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), orders[lane.seed])

    def count_right(batch: tuple[Any, Any]) -> Any:
      logits = model.apply({"params": params}, as_inputs(batch[0]), train=False)
      right = jnp.argmax(logits, axis=-1) == batch[1]
      return jnp.mean(right & jnp.all(jnp.isfinite(logits), axis=-1))

    count = len(data[2]) // _EVALUATED_AT_ONCE
    batches = jax.tree.map(
      lambda x: x[: count * _EVALUATED_AT_ONCE].reshape(count, _EVALUATED_AT_ONCE, *x.shape[1:]),
      data[2:],
    )
    return jnp.mean(jax.lax.map(count_right, batches))

  return run


def measure(path: pathlib.Path, cell: Cell) -> list[dict[str, Any]]:
  """Train all lanes of a cell; return one record for each of its settings."""
  from bnp_experiments.models import find_layers
  from bnp_experiments.training import as_inputs
  import jax
  import jax.numpy as jnp

  start = time.perf_counter()
  data = examples(path, cell.network)
  model, parameters = model_and_parameters(path, cell.network)
  layers = find_layers(model, as_inputs(data[0][:1]))
  steps = _count_steps(cell)
  orders = np.stack([order(seed, len(data[0]), steps * cell.batch_size) for seed in SEEDS])
  orders = orders.reshape(len(SEEDS), steps, cell.batch_size)
  settings = PROGRAMS[cell.program]
  lanes = [
    Lane(rate, setting, seed)
    for setting in settings.values()
    for rate in RATES[cell.optimizer]
    for seed in range(len(SEEDS))
  ]
  stacked = Lane(*(np.asarray(x) for x in zip(*lanes, strict=True)))
  stacked = stacked._replace(rate=np.float32(stacked.rate), setting=np.float32(stacked.setting))
  at_once = len(lanes)
  while cell.network != "fc" and at_once > 3 and at_once * cell.batch_size > EXAMPLES_AT_ONCE:
    at_once = max(part for part in range(1, at_once) if len(lanes) % part == 0)
  run = make_run(cell, model, layers)

  @jax.jit
  def run_all(lanes: Lane, parameters: Any, orders: Any, data: Any) -> Any:
    parts = jax.tree.map(lambda x: x.reshape(-1, at_once, *x.shape[1:]), lanes)
    return jax.lax.map(
      lambda part: jax.vmap(lambda lane: run(lane, parameters, orders, data))(part), parts
    )

  arguments = (*jax.tree.map(jnp.asarray, (stacked, parameters, orders)), data)
  compiled = run_all.lower(*arguments).compile()
  compiled_in = time.perf_counter() - start
  with _turns:
    start = time.perf_counter()
    accuracy = np.asarray(compiled(*arguments), np.float64)
    run_in = time.perf_counter() - start
  shape = len(settings), len(RATES[cell.optimizer]), len(SEEDS)
  return [
    {
      "network": cell.network,
      "batch_size": cell.batch_size,
      "optimizer": cell.optimizer,
      "setting": setting,
      "steps": steps,
      "rates": RATES[cell.optimizer],
      "accuracy": np.round(found, 5).tolist(),
      "device": jax.devices()[0].device_kind,
      "jax": jax.__version__,
      "compile_seconds": round(compiled_in, 2),
      "run_seconds": round(run_in, 2),
    }
    for setting, found in zip(settings, accuracy.reshape(shape), strict=True)
  ]


def order(seed: int, count: int, length: int) -> np.ndarray:
  """Return the examples of a run in their order: whole permutations, one after the other."""
  generator = np.random.default_rng(seed)
  epochs = [generator.permutation(count) for _ in range(math.ceil(length / count))]
  return np.concatenate(epochs)[:length].astype(np.int32)


def _start_worker(turns: contextlib.AbstractContextManager[Any]) -> None:
  global _turns
  _turns = turns


def _measure_in_worker(
  path: pathlib.Path, deadline: float, cell: Cell
) -> tuple[Cell, list[dict[str, Any]]]:
  if time.time() > deadline:
    return cell, []
  try:
    return cell, measure(path, cell)
  except Exception as error:  # One cell that fails must not end the others.
    return cell, [{"failed": f"{type(error).__name__}: {error}"[:500]}]


def run(
  records: pathlib.Path, path: pathlib.Path, workers: int, budget: float, only: list[str]
) -> None:
  """Run the cells that have no record yet, and append their records.

  Raises:
    SystemExit: If cells failed, after the others have run.
  """
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  done = {(*_names(r), r["setting"]) for r in read(records)}
  left = [
    cell
    for words in only or [""]
    for cell in cells()
    if all(word in map(str, cell) for word in words.split(",") if word)
    and any((*_key(cell), setting) not in done for setting in PROGRAMS[cell.program])
  ]
  left = list(dict.fromkeys(left))
  start = time.time()
  measure_cell = functools.partial(_measure_in_worker, path, start + budget)
  context = multiprocessing.get_context("spawn")
  failures = 0
  turns = context.Semaphore(_PROGRAMS_AT_ONCE)
  with context.Pool(workers, _start_worker, (turns,)) as pool, records.open("a") as file:
    for number, (cell, found) in enumerate(pool.imap_unordered(measure_cell, left), start=1):
      failed = [record["failed"] for record in found if "failed" in record]
      failures += len(failed)
      for record in found if not failed else []:
        file.write(json.dumps(record) + "\n")
      file.flush()
      note = failed[0] if failed else "" if found else "no time left"
      times = "" if failed or not found else _times(found[0])
      print(
        f"{time.time() - start:6.0f} s  {number}/{len(left)}  {' '.join(map(str, cell))}  "
        f"{times}{note}",
        flush=True,
      )
  if failures:
    raise SystemExit(f"{failures} cells failed; the same command runs them again")


def _key(cell: Cell) -> tuple[str, int, str]:
  return cell.network, cell.batch_size, cell.optimizer


def _names(record: dict[str, Any]) -> tuple[str, int, str]:
  return record["network"], record["batch_size"], record["optimizer"]


def _times(record: dict[str, Any]) -> str:
  return f"compile {record['compile_seconds']} s, run {record['run_seconds']} s"


def test(records: pathlib.Path, path: pathlib.Path) -> None:
  """Test BNP's defaults and the optimizers alone, and append the records."""
  done = read(records)
  tested = {(*_names(r), r["setting"]) for r in done if "test_accuracy" in r}
  for network, batch_size, optimizer, setting in TESTED:
    if (network, batch_size, optimizer, setting) in tested:
      continue
    selected = [
      r
      for r in done
      if (*_names(r), r["setting"]) == (network, batch_size, optimizer, setting) and "accuracy" in r
    ]
    best = int(np.argmax(np.mean(selected[0]["accuracy"], axis=1)))
    rate = selected[0]["rates"][best]
    program = "alone" if setting == "alone" else "defaults"
    found = _test(path, Cell(program, batch_size, network, optimizer), rate)
    record = {
      "network": network,
      "batch_size": batch_size,
      "optimizer": optimizer,
      "setting": setting,
      "rate": rate,
      "test_accuracy": found,
    }
    with records.open("a") as file:
      file.write(json.dumps(record) + "\n")
    print(json.dumps(record), flush=True)


def _test(path: pathlib.Path, cell: Cell, rate: float) -> list[float]:
  """Train from each of `TEST_SEEDS`, and return the accuracy on the test images."""
  from bnp_experiments import data
  from bnp_experiments.models import find_layers
  from bnp_experiments.training import as_inputs
  import jax

  dataset, (x, y, *_) = data.load("cifar10"), map(np.asarray, examples(path, cell.network))
  model, _ = model_and_parameters(path, cell.network)
  layers = find_layers(model, as_inputs(x[:1]))
  tx = make_optimizer(cell, Lane(rate, (math.inf, math.inf), 0), layers)
  step = jax.jit(functools.partial(take_step, model, tx), donate_argnums=0)
  classify = jax.jit(lambda p, x: model.apply({"params": p}, as_inputs(x), train=False).argmax(-1))
  steps, accuracies = STEPS[cell.batch_size][0], []
  for seed in TEST_SEEDS:
    params = model.init(jax.random.key(seed), as_inputs(x[:1]), train=False)["params"]
    carry = params, tx.init(params)
    for indices in order(seed, len(x), steps * cell.batch_size).reshape(steps, -1):
      carry = step(carry, x[indices], y[indices])
    parts = np.split(dataset.x_test, 20)
    predicted = np.concatenate([classify(carry[0], part) for part in parts])
    accuracies.append(round(float(np.mean(predicted == dataset.y_test)), 5))
  return accuracies


def read(records: pathlib.Path) -> list[dict[str, Any]]:
  """Read the records; none if there is no file."""
  if not records.exists():
    return []
  return [json.loads(line) for line in records.read_text().splitlines() if line]


Key = tuple[str, str, int]
Best = dict[Key, dict[str, np.ndarray]]
NAMES = ("alone", "paper", *CORRECTED)


def measured(records: pathlib.Path) -> Iterator[tuple[Key, str, np.ndarray]]:
  """Yield network, optimizer and batch size, a setting, and its accuracy in %, `[rates, seeds]`."""
  for record in read(records):
    if "accuracy" in record:
      key = record["network"], record["optimizer"], record["batch_size"]
      yield key, record["setting"], 100 * np.array(record["accuracy"])


def best_rates(records: pathlib.Path) -> Best:
  """Return the accuracy in % of each setting in each cell at its best rate, `[seeds]`."""
  best: Best = {}
  for key, setting, accuracy in measured(records):
    best.setdefault(key, {})[setting] = accuracy[accuracy.mean(axis=1).argmax()]
  order = list(itertools.product(NETWORKS, RATES, sorted(BATCH_SIZES)))
  return {key: best[key] for key in order if key in best}


def rates_within_a_point(records: pathlib.Path) -> dict[Key, dict[str, int]]:
  """Return the number of learning rates within a point of the best, for each setting of a cell."""
  widths: dict[Key, dict[str, int]] = {}
  for key, setting, accuracy in measured(records):
    means = accuracy.mean(axis=1)
    widths.setdefault(key, {})[setting] = int(np.sum(means >= means.max() - 1))
  return widths


def one_rate(records: pathlib.Path) -> dict[tuple[str, str], dict[str, tuple[float, float, float]]]:
  """Compare one learning rate for all batch sizes with the best rate for each.

  Args:
    records: The records.

  Returns:
    For each network, optimizer and setting: the mean accuracy in % over the batch sizes with the
    best rate for each, with the best one rate, and that rate.
  """
  means: dict[tuple[str, str, str], dict[int, np.ndarray]] = {}
  for (network, optimizer, size), setting, accuracy in measured(records):
    means.setdefault((network, optimizer, setting), {})[size] = accuracy.mean(axis=1)
  found: dict[tuple[str, str], dict[str, tuple[float, float, float]]] = {}
  for (network, optimizer, setting), sizes in means.items():
    if len(sizes) == len(BATCH_SIZES):
      each = float(np.mean([x.max() for x in sizes.values()]))
      one = np.mean(list(sizes.values()), axis=0)
      rate = RATES[optimizer][one.argmax()]
      found.setdefault((network, optimizer), {})[setting] = each, float(one.max()), rate
  return found


def best_rate_of_debias(records: pathlib.Path) -> dict[Key, float]:
  """Return the learning rate of the highest mean accuracy with `debias`, for each cell."""
  return {
    key: RATES[key[1]][accuracy.mean(axis=1).argmax()]
    for key, setting, accuracy in measured(records)
    if setting == "debias"
  }


def report(records: pathlib.Path) -> None:
  """Print the tables of the page, and apply the rule."""
  best = best_rates(records)
  print("| network, optimizer, batch size | " + " | ".join(NAMES) + " |")
  print("| --- |" + " --: |" * len(NAMES))
  for key, found in best.items():
    row = [f"{found[name].mean():.1f}" if name in found else "" for name in NAMES]
    print(f"| {_label(*key)} | {' | '.join(row)} |")

  complete = [key for key, found in best.items() if all(name in found for name in NAMES[1:])]
  groups = {"network": NETWORKS, "batch size": {size: str(size) for size in sorted(BATCH_SIZES)}}
  for title, names in groups.items():
    print(f"\n| {title} | cells | " + " | ".join(NAMES[1:]) + " |")
    print("| --- | --: |" + " --: |" * len(NAMES[1:]))
    for value, name in {**names, "all": "all"}.items():
      keys = [key for key in complete if value in (*key, "all")]
      means = [f"{np.mean([best[key][n].mean() for key in keys]):.1f}" for n in NAMES[1:]]
      print(f"| {' | '.join([name, str(len(keys)), *means])} |")

  print("\n| rates within a point of the best | " + " | ".join(NAMES) + " |")
  print("| --- |" + " --: |" * len(NAMES))
  widths = rates_within_a_point(records)
  for key in best:
    if key[0] in ("fc", "cnn") and key[1] in ("sgd", "adam") and key[2] in (1, 60, 512):
      row = [str(widths[key].get(name, "")) for name in NAMES]
      print(f"| {_label(*key)} | {' | '.join(row)} |")

  print("\n| variants of debias | " + " | ".join(("debias", *VARIANTS, "q = 1")) + " |")
  print("| --- |" + " --: |" * (2 + len(VARIANTS)))
  for key, found in best.items():
    if found.keys() & {*VARIANTS, "q = 1"}:
      names = ("debias", *VARIANTS, "q = 1")
      row = [f"{found[name].mean():.1f}" if name in found else "" for name in names]
      print(f"| {_label(*key)} | {' | '.join(row)} |")

  print("\n| one rate for all batch sizes | " + " | ".join(NAMES) + " |")
  print("| --- |" + " --: |" * len(NAMES))
  found = one_rate(records)
  for network, optimizer in itertools.product(NETWORKS, RATES):
    row = found.get((network, optimizer), {})
    texts = ["{:.1f} → {:.1f} at {:g}".format(*row[n]) if n in row else "" for n in NAMES]
    print(f"| {NETWORKS[network]}, {OPTIMIZER_NAMES[optimizer]} | {' | '.join(texts)} |")

  print("\n| best rate with debias | " + " | ".join(map(str, sorted(BATCH_SIZES))) + " |")
  print("| --- |" + " --: |" * len(BATCH_SIZES))
  rates = best_rate_of_debias(records)
  for network, optimizer in itertools.product(NETWORKS, RATES):
    found = [rates.get((network, optimizer, size), math.nan) for size in sorted(BATCH_SIZES)]
    edges = min(RATES[optimizer]), max(RATES[optimizer])
    row = [f"{rate:g}{'*' * (rate in edges)}" for rate in found]
    print(f"| {NETWORKS[network]}, {OPTIMIZER_NAMES[optimizer]} | {' | '.join(row)} |")

  def mean(name: str) -> float:
    return float(np.mean([best[key][name].mean() for key in complete]))

  winner = max(("paper", "debias", "debias, lag_guard=2"), key=mean)
  print(f"\nHighest: {winner}. Cells where it is below the paper's start by more than the range:")
  for key in complete:
    loss = best[key]["paper"].mean() - best[key][winner].mean()
    if loss > np.ptp(best[key]["paper"]):
      print(f"  {key}: {loss:.1f} points, range {np.ptp(best[key]['paper']):.1f}")

  tested = {(*_names(r), r["setting"]): r for r in read(records) if "test_accuracy" in r}
  print("\n| network, optimizer, batch size | alone | BNP |\n| --- | --: | --: |")
  for cell in dict.fromkeys(key[:3] for key in tested):
    found = [100 * np.array(tested[*cell, s]["test_accuracy"]) for s in ("alone", "debias")]
    row = [f"{x.mean():.1f} ({x.min():.1f}–{x.max():.1f})" for x in found]
    print(f"| {_label(cell[0], cell[2], cell[1])} | {' | '.join(row)} |")
  sizes = sorted({key[1] for key in tested})
  print("\n| | " + " | ".join(f"batch size {b}" for b in sizes) + " |")
  print("| --- |" + " --: |" * len(sizes))
  for network, optimizer, setting in dict.fromkeys((n, o, s) for n, _, o, s in tested):
    found = [
      np.mean(100 * np.array(tested[network, b, optimizer, setting]["test_accuracy"]))
      for b in sizes
      if (network, b, optimizer, setting) in tested
    ]
    bnp, mark = (" with BNP", "**") if setting == "debias" else ("", "")
    name = f"{NETWORKS[network]}, {OPTIMIZER_NAMES[optimizer]}{bnp}"
    print(f"| {' | '.join(f'{mark}{x}{mark}' for x in (name, *(f'{x:.1f}' for x in found)))} |")


def _label(network: str, optimizer: str, batch_size: int) -> str:
  return f"{NETWORKS[network]}, {OPTIMIZER_NAMES[optimizer]}, {batch_size}"


def figure(records: pathlib.Path) -> None:
  """Draw the two pictures of the page beside the records."""
  best = best_rates(records)
  _draw_accuracy(best, records.with_suffix(".png"))
  _draw_gain(best, records.with_name(f"{records.stem}_gain.png"))


def _draw_accuracy(best: Best, path: pathlib.Path) -> None:
  """Draw the accuracy of FC and CNN against the batch size."""
  import matplotlib.pyplot as plt

  styles = {
    "alone": ("#A6A6A6", "s", "optimizer alone"),
    "paper": ("#56B4E9", "v", "BNP, the paper's start"),
    "debias": ("#0072B2", "o", "BNP"),
    "debias, bounded step": ("#999933", "X", "BNP, bounded step"),
  }
  shown = ("fc", "cnn")
  fig, axes = plt.subplots(
    len(shown), len(RATES), figsize=(11, 5.2), sharex=True, sharey=True, layout="constrained"
  )
  for axis, (network, optimizer) in zip(axes.flat, itertools.product(shown, RATES), strict=True):
    for setting, (colour, marker, label) in styles.items():
      points = [
        (batch_size, found[setting].mean())
        for (n, o, batch_size), found in best.items()
        if (n, o) == (network, optimizer) and setting in found
      ]
      if points:
        axis.plot(*zip(*points, strict=True), color=colour, marker=marker, label=label)
    axis.set_title(f"{NETWORKS[network]}, {OPTIMIZER_NAMES[optimizer]}", fontsize=10)
    axis.set_xscale("log")
    axis.set_xticks([1, 6, 60, 512], ["1", "6", "60", "512"])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
  fig.supxlabel("batch size")
  fig.supylabel("accuracy on held-out images (%)")
  fig.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
  fig.savefig(path, dpi=150)


def _draw_gain(best: Best, path: pathlib.Path) -> None:
  """Draw what `debias` gains over the paper's start in each cell, in points."""
  import matplotlib.pyplot as plt

  sizes = sorted(BATCH_SIZES)
  fig, axes = plt.subplots(3, 2, figsize=(9, 6), sharex=True, sharey=True, layout="constrained")
  for axis, (network, title) in zip(axes.flat, NETWORKS.items(), strict=True):
    gains = np.full((len(RATES), len(sizes)), np.nan)
    for (row, optimizer), (column, size) in itertools.product(enumerate(RATES), enumerate(sizes)):
      found = best.get((network, optimizer, size), {})
      if {"paper", "debias"} <= found.keys():
        gains[row, column] = found["debias"].mean() - found["paper"].mean()
        text, strong = f"{gains[row, column]:+.1f}", abs(gains[row, column]) > 7
        axis.text(column, row, text, ha="center", va="center", color="w" if strong else "k")
    image = axis.imshow(gains, cmap="RdBu", vmin=-12, vmax=12, aspect="auto")
    axis.set_title(title, fontsize=10)
    axis.set_xticks(range(len(sizes)), map(str, sizes))
    axis.set_yticks(range(len(RATES)), [OPTIMIZER_NAMES[optimizer] for optimizer in RATES])
  fig.colorbar(image, ax=axes, extend="max", label="gain (points of accuracy)")
  fig.supxlabel("batch size")
  fig.savefig(path, dpi=150)


def main() -> None:
  """Read the command line."""
  parser = argparse.ArgumentParser(description="Compare settings of BNP.")
  parser.add_argument("command", choices=("pack", "run", "test", "report", "figure"))
  parser.add_argument("file", type=pathlib.Path, help="the examples to pack, or the records")
  parser.add_argument("--examples", type=pathlib.Path, help="the file that pack wrote")
  parser.add_argument("--workers", type=int, default=1, help="number of processes")
  parser.add_argument("--budget", type=float, default=math.inf, help="seconds to start cells in")
  parser.add_argument("--only", nargs="*", default=[], help="such as fc,sgd,60 fc,adam")
  options = parser.parse_args()
  if options.command == "run":
    run(options.file, options.examples, options.workers, options.budget, options.only)
  elif options.command == "test":
    test(options.file, options.examples)
  else:
    {"pack": pack, "report": report, "figure": figure}[options.command](options.file)


if __name__ == "__main__":
  main()
