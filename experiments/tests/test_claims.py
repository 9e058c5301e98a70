"""Tests of the rules that judge claims, on outcomes written by hand."""

import dataclasses

from bnp_experiments import claims, methods
from bnp_experiments.outcomes import Outcome
import numpy as np
import pytest


def _outcome(method, accuracy, batch_size=6, seconds=()):
  """Return an outcome with these accuracies, in percent, `[epochs][seeds]`."""
  accuracy = np.array(accuracy, float) / 100
  nothing = np.array([])
  times = np.array(seconds, float)
  return Outcome(
    method, batch_size, (0.1,), nothing, 0.1, 10, np.zeros_like(accuracy), accuracy, times, nothing
  )


BNP = _outcome(methods.BNP, [[30, 32], [50, 51], [49, 52], [50, 52], [50, 50], [49, 51]])
SGD = _outcome(methods.SGD, [[20, 21], [30, 30], [40, 40], [44, 44], [46, 47], [48, 50]])
BATCHNORM = _outcome(methods.BATCHNORM, [[10, 10]] * 5 + [[10, 12]])


@pytest.mark.parametrize(
  ("judge", "verdict", "measured"),
  [
    (
      claims.better("bnp", "batchnorm"),
      "holds",
      "BNP, paper's start 50.0 (49.0–51.0); BatchNorm 11.0",
    ),
    (claims.better("bnp", "batchnorm", "sgd"), "within the spread", "SGD 49.0 (48.0–50.0)"),
    (
      claims.better("bnp", "sgd", early=True),
      "holds",
      "BNP, paper's start 40.8 (40.0–41.5); SGD 25.2",
    ),
    (claims.better("batchnorm", "bnp"), "does not hold", ""),
    (claims.better("bnp", "layernorm"), "not run", "no results of layernorm"),
    (claims.better("bnp", "sgd", batch_size=1), "not run", "no results of bnp, sgd"),
    (claims.below("batchnorm", "bnp", "sgd"), "holds", ""),
    (claims.below("sgd", "bnp"), "within the spread", ""),
    (claims.below("bnp", "batchnorm"), "does not hold", ""),
    (claims.comparable("bnp", "sgd"), "holds", ""),
    (claims.comparable("bnp", "batchnorm"), "does not hold", ""),
    (claims.trains("bnp", "sgd"), "holds", ""),
    (claims.trains("bnp", "batchnorm"), "does not hold", ""),
    (claims.fails("batchnorm"), "holds", "BatchNorm 11.0 (10.0–12.0)"),
    (claims.fails("bnp"), "does not hold", ""),
    (claims.falls_back("bnp"), "within the spread", "middle third 50.8 (49.5–52.0), last 50.0"),
    (claims.falls_back("sgd"), "does not hold", ""),
    (claims.falls_back("adam"), "not run", ""),
  ],
)
def test_verdicts(judge, verdict, measured):
  judgement = judge([BNP, SGD, BATCHNORM])
  assert judgement.verdict == verdict
  assert measured in judgement.measured


def test_overfitting_is_a_fall_from_the_middle_third_to_the_last():
  outcome = _outcome(methods.BNP, [[30, 32], [40, 41], [50, 52], [52, 51], [50, 50], [49, 51]])
  judgement = claims.falls_back("bnp")([outcome])
  assert judgement == ("holds", "middle third 51.2 (51.0–51.5), last 50.0 (49.5–50.5)")


def test_a_single_epoch_cannot_fall_back():
  judgement = claims.falls_back("bnp")([_outcome(methods.BNP, [[30, 32]])])
  assert judgement == ("within the spread", "fewer than three epochs")


def test_one_run_is_within_the_spread():
  pair = [_outcome(methods.BNP, [[60]]), _outcome(methods.SGD, [[10]])]
  assert claims.better("bnp", "sgd")(pair).verdict == "within the spread"


def test_the_start_ends_before_the_first_decay():
  outcome = dataclasses.replace(_outcome(methods.BNP, [[10], [20]] + [[90]] * 10), decays=(2, 8))
  np.testing.assert_allclose(outcome.early, 0.15)


def test_gains_are_counted_from_the_first_decay():
  before, after = [[30, 32]] * 4, [[50, 51], [52, 53]]
  bnp = dataclasses.replace(_outcome(methods.BNP, before + after), decays=(4, 5))
  sgd = dataclasses.replace(_outcome(methods.SGD, after + before), decays=(4, 5))
  much = claims.gains_more("bnp", "sgd")([bnp, sgd])
  assert much == ("holds", "BNP, paper's start 21.5 (21.0–22.0); SGD 0.0 (0.0–0.0)")
  assert claims.gains_more("sgd", "bnp")([bnp, sgd]).verdict == "does not hold"
  never = [dataclasses.replace(outcome, decays=(80, 120)) for outcome in (bnp, sgd)]
  assert claims.gains_more("bnp", "sgd")(never).verdict == "within the spread"


def test_a_method_is_steady_if_its_batch_size_does_not_matter():
  outcomes = [
    _outcome(methods.BNP, [[50, 51]], 1),
    _outcome(methods.BNP, [[51, 52]], 60),
    _outcome(methods.BNP, [[55, 55]], 512),
  ]
  assert claims.steady("bnp", 1, 60)(outcomes).verdict == "holds"
  assert claims.steady("bnp", 1, 60, 512)(outcomes).verdict == "does not hold"
  assert claims.steady("bnp", 1, 2)(outcomes).verdict == "not run"


@pytest.mark.parametrize(
  ("seconds", "verdict"),
  [
    ([1, 2, 3], "holds"),
    ([3, 4, 5], "does not hold"),
    ([1, 2.5, 5], "within the spread"),
    ([], "not run"),
  ],
)
def test_times_are_compared_round_by_round(seconds, verdict):
  outcomes = [
    _outcome(methods.BNP, [[50]], seconds=seconds),
    _outcome(methods.SGD, [[50]], seconds=[2, 2.5, 3.5][: len(seconds)]),
  ]
  assert claims.quicker("bnp", "sgd", 6)(outcomes).verdict == verdict


def test_the_tolerance_shrinks_with_the_error():
  outcomes = [_outcome(methods.BNP, [[98.0, 98.0]]), _outcome(methods.SGD, [[97.0, 97.0]])]
  assert claims.comparable("bnp", "sgd")(outcomes).verdict == "does not hold"
  outcomes[1] = _outcome(methods.SGD, [[97.7]])
  assert claims.comparable("bnp", "sgd")(outcomes).verdict == "holds"


def test_first_epoch_of_an_accuracy():
  assert SGD.first_epoch(0.4) == 3
  assert SGD.first_epoch(0.9) == np.inf
  assert not SGD.at_edge


@pytest.mark.parametrize(
  "judge",
  [
    claims.better("bnp", "sgd"),
    claims.comparable("bnp", "sgd"),
    claims.trains("bnp"),
    claims.fails("bnp"),
    claims.steady("bnp", 6),
  ],
)
def test_single_runs_decide_nothing(judge):
  outcomes = [_outcome(methods.BNP, [[98.0]]), _outcome(methods.SGD, [[10.0]])]
  assert judge(outcomes).verdict == "within the spread"


def _conditioned(d, gain):
  """Return an outcome with kappa(D) and the gain of P in each run; the first epoch differs."""
  before, after = np.full((len(d), 2), 7.0), np.ones((len(d), 4))
  d, gain = np.array(d, float)[:, None], np.array(gain, float)[:, None]
  plain = np.hstack([before, 1e6 * after])
  measured = {"steps": np.tile([0, 5, 10, 15, 20, 25], (len(d), 1)), "plain": plain}
  for epsilons in ("paper", "none"):
    factor = 1 if epsilons == "paper" else 100
    measured[f"D, epsilons {epsilons}"] = np.hstack([before, factor * d * after])
    measured[f"preconditioned, epsilons {epsilons}"] = np.hstack([before, 1e6 * after / gain])
  return dataclasses.replace(BNP, conditioning=measured)


@pytest.mark.parametrize(
  ("kappa", "verdict"),
  [
    ([100, 1000], "holds"),
    ([10, 11], "does not hold"),
    ([10, 100], "within the spread"),
    ([200], "within the spread"),
  ],
)
def test_the_range_of_kappa_of_d(kappa, verdict):
  judgement = claims.kappa_of_D(1e2, 1e5)([_conditioned(kappa, kappa)])
  assert judgement.verdict == verdict
  low, high = min(kappa), max(kappa)
  shown = f"{low:.1e} to {high:.1e}; without epsilons {100 * low:.1e} to {100 * high:.1e}"
  assert judgement.measured == shown


@pytest.mark.parametrize(
  ("gain", "verdict"),
  [
    ([1e4, 2e3], "holds"),
    ([9e2, 8], "does not hold"),
    ([9e2, 1e4], "within the spread"),
    ([1e4], "within the spread"),
  ],
)
def test_the_gain_beside_kappa_of_d_squared(gain, verdict):
  judgement = claims.improves_by_kappa_of_D_squared()([_conditioned([100] * len(gain), gain)])
  assert judgement.verdict == verdict
  assert judgement.measured.startswith(f"by {np.mean(gain):.1f}, kappa(D)^2 = 1.0e+04")


def test_condition_numbers_that_were_not_measured():
  assert claims.kappa_of_D(1e2, 1e5)([BNP]).verdict == "not run"
  assert claims.improves_by_kappa_of_D_squared()([BNP]).verdict == "not run"
