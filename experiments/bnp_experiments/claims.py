"""Claims about an experiment, and the rules that decide whether a claim holds.

"Better" holds if every run of the one method is above every run of the other, fails if every one is
below, and is within the spread otherwise; a single run has no spread and decides nothing.
"Comparable" holds if the means differ by at most two points and at most a fifth of the smaller
error. "Faster at the start" is better in the mean over the first third of the epochs, before the
learning rate decays. The gain from the decays is measured from the epoch before the first one. A
network "trains" if it ends above twice chance, which is 10 % on the data sets of ten classes. Times
are compared by the quartiles of their ratio over rounds of measuring.
"""

from collections.abc import Callable, Sequence
import dataclasses
import operator
from typing import Literal, NamedTuple

import numpy as np

from bnp_experiments.outcomes import Outcome, find, percent

Verdict = Literal["holds", "does not hold", "within the spread", "not run"]
_POINTS, _PART_OF_ERROR = 0.02, 0.2
TRAINS = 0.2
"""Twice chance on ten classes: the test accuracy above which a network counts as trained."""


class Judgement(NamedTuple):
  """The verdict on a claim, and the numbers behind it."""

  verdict: Verdict
  measured: str


Judge = Callable[[Sequence[Outcome]], Judgement]


@dataclasses.dataclass(frozen=True)
class Claim:
  """A claim: its text, in one line, and the function that judges it."""

  text: str
  judge: Judge


def better(method: str, *others: str, batch_size: int | None = None, early: bool = False) -> Judge:
  """Judge whether a method is above each of the others at the end, or over the first epochs."""
  values = operator.attrgetter("early" if early else "final")
  return _comparing(method, others, batch_size, values, _is_above)


def gains_more(method: str, *others: str) -> Judge:
  """Judge whether a method gains more from the decays of the learning rate than the others."""
  return _comparing(method, others, None, operator.attrgetter("gain"), _is_above)


def below(method: str, *others: str) -> Judge:
  """Judge whether a method ends below each of the others."""

  def is_below(ours: np.ndarray, theirs: np.ndarray) -> Verdict:
    return _is_above(theirs, ours)

  return _comparing(method, others, None, operator.attrgetter("final"), is_below)


def comparable(method: str, *others: str, batch_size: int | None = None) -> Judge:
  """Judge whether a method ends at an accuracy comparable with that of each of the others."""

  def is_close(ours: np.ndarray, theirs: np.ndarray) -> Verdict:
    return _decide(_close(ours.mean(), theirs.mean()), ours)

  return _comparing(method, others, batch_size, operator.attrgetter("final"), is_close)


def trains(*methods: str) -> Judge:
  """Judge whether networks train with these methods."""
  return _each(methods, lambda outcome: outcome.final.min() > TRAINS)


def fails(*methods: str) -> Judge:
  """Judge whether networks fail to train with these methods."""
  return _each(methods, lambda outcome: outcome.final.max() <= TRAINS)


def falls_back(method: str) -> Judge:
  """Judge whether test accuracy is lower in the last third of the epochs than in the middle."""

  def judge(outcomes: Sequence[Outcome]) -> Judgement:
    outcome = find(outcomes, method, None)
    if outcome is None:
      return _not_run(method)
    if len(outcome.test_accuracy) < 3:
      return Judgement("within the spread", "fewer than three epochs")
    _, middle, last = (x.mean(axis=0) for x in np.array_split(outcome.test_accuracy, 3))
    verdict = _is_above(middle - last, np.zeros_like(middle))
    return Judgement(verdict, f"middle third {percent(middle)}, last {percent(last)}")

  return judge


def quicker(method: str, other: str, batch_size: int) -> Judge:
  """Judge whether a step of one method takes less time than a step of another, round by round."""

  def judge(outcomes: Sequence[Outcome]) -> Judgement:
    ours, theirs = (find(outcomes, name, batch_size) for name in (method, other))
    if ours is None or theirs is None or not len(ours.seconds):
      return Judgement("not run", "no times")
    low, middle, high = np.percentile(ours.seconds / theirs.seconds, [25, 50, 75])
    verdict = "holds" if high < 1 else "does not hold" if low > 1 else "within the spread"
    ratio = f"{ours.method.label} / {theirs.method.label}"
    return Judgement(verdict, f"{ratio} {middle:.2f} ({low:.2f}–{high:.2f})")

  return judge


def kappa_of_D(low: float, high: float) -> Judge:  # noqa: N802
  """Judge whether the condition number of BNP's D stays in a range after the first epoch.

  It does in a run if more than nine in ten measurements are in the range.
  """

  def judge(outcomes: Sequence[Outcome]) -> Judgement:
    outcome = find(outcomes, "bnp", None)
    if outcome is None or not outcome.conditioning:
      return _not_run("bnp")
    kappa, none = (_later(outcome, f"D, epsilons {x}") for x in ("paper", "none"))
    inside = np.array([((low <= run) & (run <= high)).mean() > 0.9 for run in kappa])
    shown = f"{np.min(kappa):.1e} to {np.max(kappa):.1e}"
    return Judgement(
      _decide_runs(inside),
      f"{shown}; without epsilons {np.min(none):.1e} to {np.max(none):.1e}",
    )

  return judge


def improves_by_kappa_of_D_squared() -> Judge:  # noqa: N802
  """Judge whether P lowers the condition number by kappa(D)^2, within a factor of ten.

  Each run has the median after the first epoch.
  """

  def judge(outcomes: Sequence[Outcome]) -> Judgement:
    outcome = find(outcomes, "bnp", None)
    if outcome is None or not outcome.conditioning:
      return _not_run("bnp")
    plain = _later(outcome, "plain")

    def medians(epsilons: str) -> tuple[np.ndarray, np.ndarray, str]:
      gain = np.median(plain / _later(outcome, f"preconditioned, epsilons {epsilons}"), axis=1)
      expected = np.median(_later(outcome, f"D, epsilons {epsilons}") ** 2, axis=1)
      shown = f"by {np.mean(gain):.1f}, kappa(D)^2 = {np.mean(expected):.1e}"
      return gain, expected, shown

    gain, expected, shown = medians("paper")
    near = np.abs(np.log10(gain / expected)) <= 1
    return Judgement(_decide_runs(near), f"{shown}; without epsilons {medians('none')[2]}")

  return judge


def steady(method: str, *batch_sizes: int) -> Judge:
  """Judge whether the final accuracies of a method at these batch sizes are comparable."""

  def judge(outcomes: Sequence[Outcome]) -> Judgement:
    found = [find(outcomes, method, batch_size) for batch_size in batch_sizes]
    available = [outcome for outcome in found if outcome is not None]
    if len(available) < len(found):
      return _not_run(method)
    means = [outcome.final.mean() for outcome in available]
    return Judgement(
      _decide(_close(max(means), min(means)), available[0].final),
      ", ".join(f"{outcome.batch_size}: {percent(outcome.final)}" for outcome in available),
    )

  return judge


def _comparing(
  method: str,
  others: Sequence[str],
  batch_size: int | None,
  values: Callable[[Outcome], np.ndarray],
  compare: Callable[[np.ndarray, np.ndarray], Verdict],
) -> Judge:
  """Judge a method by the least favourable comparison with the others."""

  def judge(outcomes: Sequence[Outcome]) -> Judgement:
    found, missing = _find_all(outcomes, (method, *others), batch_size)
    if missing:
      return _not_run(*missing)
    ours, *theirs = found
    return Judgement(
      _least_favourable([compare(values(ours), values(outcome)) for outcome in theirs]),
      "; ".join(f"{one.method.label} {percent(values(one))}" for one in found),
    )

  return judge


def _each(methods: Sequence[str], holds: Callable[[Outcome], np.bool_]) -> Judge:
  """Judge whether a condition holds for each of the methods."""

  def judge(outcomes: Sequence[Outcome]) -> Judgement:
    found, missing = _find_all(outcomes, methods, None)
    if missing:
      return _not_run(*missing)
    return Judgement(
      _decide(all(map(holds, found)), found[0].final),
      "; ".join(f"{outcome.method.label} {percent(outcome.final)}" for outcome in found),
    )

  return judge


def _find_all(
  outcomes: Sequence[Outcome], methods: Sequence[str], batch_size: int | None
) -> tuple[list[Outcome], list[str]]:
  """Return the outcomes of methods, and the names of the methods that were not run."""
  found = {name: find(outcomes, name, batch_size) for name in methods}
  missing = [name for name, outcome in found.items() if outcome is None]
  return [outcome for outcome in found.values() if outcome is not None], missing


def _later(outcome: Outcome, name: str) -> np.ndarray:
  """Return the condition numbers of each run after the first epoch, `[seeds, measurements]`."""
  later = outcome.conditioning["steps"][0] >= outcome.steps
  return outcome.conditioning[name][:, later]


def _decide_runs(holds: np.ndarray) -> Verdict:
  """Return the verdict on a condition that each run fulfils or not."""
  return _decide(bool(holds.all()), holds) if len({*holds}) == 1 else "within the spread"


def _decide(holds: bool, runs: np.ndarray) -> Verdict:
  """Return the verdict on a condition, which a single run does not decide."""
  if len(runs) == 1:
    return "within the spread"
  return "holds" if holds else "does not hold"


def _is_above(ours: np.ndarray, theirs: np.ndarray) -> Verdict:
  if len(ours) == 1:
    return "within the spread"
  if ours.min() > theirs.max():
    return "holds"
  return "does not hold" if ours.max() < theirs.min() else "within the spread"


def _close(a: float, b: float) -> bool:
  return abs(a - b) <= min(_POINTS, _PART_OF_ERROR * (1 - max(a, b)))


def _least_favourable(verdicts: Sequence[Verdict]) -> Verdict:
  order: tuple[Verdict, ...] = ("does not hold", "within the spread", "holds")
  return min(verdicts, key=order.index)


def _not_run(*methods: str) -> Judgement:
  return Judgement("not run", f"no results of {', '.join(methods)}")
