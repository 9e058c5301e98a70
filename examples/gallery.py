"""What the examples share: methods, the choice of the learning rate, table and picture.

Every method has the same learning rates. The best one is chosen on validation data, with seed 0.
The results are those of five other seeds with that rate, on test data.
"""

from collections.abc import Callable, Sequence
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from matplotlib import pyplot as plt
import numpy as np
import optax

import bnp_optax

RESULTS = pathlib.Path(__file__).parents[1] / "notebooks" / "results"
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0)
SEEDS = (1, 2, 3, 4, 5)


class Method(NamedTuple):
  """A method: its label, its colour and marker in the pictures, and its optimizer."""

  label: str
  colour: str
  marker: str
  optimizer: Callable[[Any], optax.GradientTransformationExtraArgs]


class Scores(NamedTuple):
  """The scores of runs: on validation data and on test data ``[runs]``, and over time."""

  validation: Any
  test: Any
  curve: Any


def _bnp(rate: Any) -> optax.GradientTransformationExtraArgs:
  return optax.chain(bnp_optax.scale_by_bnp(), optax.sgd(rate))


def _bnp_adam(rate: Any) -> optax.GradientTransformationExtraArgs:
  return bnp_optax.bnp(optax.adam(rate))


SGD = Method("SGD", "#A6A6A6", "s", lambda r: optax.with_extra_args_support(optax.sgd(r)))
ADAM = Method("Adam", "#000000", "<", lambda r: optax.with_extra_args_support(optax.adam(r)))
BNP = Method("BNP", "#0072B2", "o", _bnp)
BNP_ADAM = Method("bnp(Adam)", "#D55E00", "h", _bnp_adam)
METHODS = (SGD, ADAM, BNP, BNP_ADAM)
Run = Callable[[Any, Sequence[float], Sequence[int]], Scores]


def side_by_side(run: Callable[[Any, jax.Array, jax.Array], Scores]) -> Run:
  """Return a function of rates and seeds that makes all runs of a method in one program."""

  def runs(method: Any, rates: Sequence[float], seeds: Sequence[int]) -> Scores:
    together = jax.jit(jax.vmap(lambda rate, seed: run(method, rate, seed)))
    return together(jnp.array(rates, jnp.float32), jnp.array(seeds, jnp.uint32))

  return runs


def compare(
  name: str, title: str, run: Run, score: str, *, methods: Sequence[Any] = METHODS, up: bool
) -> None:
  """Choose the rate of each method, run five seeds, and write records, table and picture.

  Args:
    name: Name of the example, and of its folder of results.
    title: Title of the picture: the data, the network, the batch size.
    run: Function that returns the scores for a method, rates and seeds.
    score: Name of the score.
    methods: The methods.
    up: Whether a higher score is better.
  """
  records, sign = [], 1 if up else -1
  for method in methods:
    tried = np.asarray(run(method, RATES, [0] * len(RATES)).validation, float)
    rate = RATES[int(np.argmax(np.where(np.isfinite(tried), sign * tried, -np.inf)))]
    tested = run(method, [rate] * len(SEEDS), SEEDS)
    test, curve = np.asarray(tested.test, float), np.asarray(tested.curve, float)
    records.append(
      {"example": name, "method": method.label, "rate": rate, "seeds": SEEDS}
      | {"validation": dict(zip(map(str, RATES), tried.tolist(), strict=True))}
      | {"score": score, "test": test.tolist(), "curve": curve.round(5).tolist()}
      | {"versions": {"bnp_optax": bnp_optax.__version__, "jax": jax.__version__}}
    )
    print(table(records[-1:]).splitlines()[-1], flush=True)
  folder = RESULTS / f"gallery-{name}"
  folder.mkdir(parents=True, exist_ok=True)
  text = "".join(json.dumps(record) + "\n" for record in records).replace("Infinity", "NaN")
  (folder / "results.jsonl").write_text(text.replace("-NaN", "null").replace("NaN", "null"))
  (folder / f"{name}.md").write_text(table(records))
  draw(records, title, methods, folder / f"{name}.png")


def table(records: Sequence[dict[str, Any]]) -> str:
  """Return a Markdown table: mean (range) of the seeds, and how many of them diverged."""
  lines = [f"| method | rate | {records[0]['score']} |", "| --- | --: | --: |"]
  for record in records:
    test = np.array(record["test"], float)
    edge = "*" * (record["rate"] in (min(RATES), max(RATES)))
    ran = test[np.isfinite(test)]
    text = f"{ran.mean():.3g} ({ran.min():.3g}–{ran.max():.3g})" if ran.size else ""
    if ran.size < test.size:
      text = f"{text} {test.size - ran.size} of {test.size} diverged".strip()
    lines.append(f"| {record['method']} | {record['rate']:g}{edge} | {text} |")
  return "\n".join(lines) + "\n"


def draw(
  records: Sequence[dict[str, Any]], title: str, methods: Sequence[Any], path: pathlib.Path
) -> None:
  """Plot the score over time (mean and range of the seeds) and against the learning rate."""
  figure, (time, rates) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", sharey=True)
  for method, record in zip(methods, records, strict=True):
    style = {"color": method.colour, "marker": method.marker, "markersize": 4}
    curve = np.array(record["curve"], float)
    place = np.linspace(0, 1, curve.shape[1] + 1)[1:]
    ran = int(np.isfinite(curve[:, -1]).sum())
    label = method.label + f", {ran} of {len(curve)} seeds" * (ran < len(curve))
    time.plot(place, np.nanmean(curve, axis=0), label=label, **style)
    span = np.nanquantile(curve, (0, 1), axis=0)
    time.fill_between(place, *span, color=method.colour, alpha=0.15, linewidth=0)
    rates.plot(RATES, np.array(list(record["validation"].values()), float), **style)
  time.set(xlabel="fraction of the training", ylabel=records[0]["score"], title="test, five seeds")
  rates.set(xscale="log", xlabel="learning rate", title="validation, one seed")
  for axes in (time, rates):
    axes.grid(color="#E6E6E6", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
  values = np.concatenate([np.ravel(record["curve"]) for record in records]).astype(float)
  low, high = np.nanmin(values), np.nanmax(values)
  # Runs and trials that diverged are beyond the axis.
  if low > 0 and high > 30 * low:
    high = min(high, 100 * np.nanmedian(values))
    time.set(yscale="log", ylim=(low / 1.3, 1.3 * high))
  else:
    time.set_ylim(1.1 * low - 0.1 * high, 1.1 * high - 0.1 * low)
  figure.suptitle(title)
  figure.legend(frameon=False, ncols=min(len(records), 4), loc="outside lower center")
  figure.savefig(path, dpi=150, facecolor="white")
  plt.close(figure)
