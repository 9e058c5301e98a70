"""A state restored by Orbax, on other devices too, continues its run; that of another is refused.

Across a change of the number of processes: tests/test_distributed.py.
"""

import gc

import chex
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import bnp_optax
from tests import problems, reference
from tests.distributed_worker import P, make_mesh

pytestmark = pytest.mark.usefixtures("standard_promotion", "x64")

MODEL = problems.MLP("float64")
OPTIMIZERS = {
  "scale_by_bnp": bnp_optax.scale_by_bnp(debias=False),
  "chain": optax.chain(bnp_optax.scale_by_bnp(debias=False), optax.sgd(0.1, momentum=0.9)),
  "bnp": bnp_optax.bnp(optax.adam(1e-2), debias=False),
  "masked": optax.masked(bnp_optax.scale_by_bnp(debias=False), {"first": True, "second": False}),
  "injected": optax.inject_hyperparams(bnp_optax.scale_by_bnp)(optax.constant_schedule(0.9)),
}


@pytest.fixture(scope="module")
def problem(x64):
  params, batch = problems.make(MODEL, (8, 8), "float64")
  return params, *problems.grads_and_stats(MODEL, params, batch)


@pytest.fixture(scope="module")
def second_updates(x64):
  """Return the updates of `bnp(adam)` for the same gradients twice, by the reference."""
  params, batch = problems.make(MODEL, (8, 8), "float64")
  grads, calls = reference.gradients(MODEL, params, batch)
  tx = reference.bnp(optax.adam(1e-2))
  with jax.numpy_dtype_promotion("standard"):
    _, state = tx.update(grads, tx.init(params), params, calls=calls)
    return tx.update(grads, state, params, calls=calls)[0]


@pytest.fixture
def checkpointer():
  with ocp.StandardCheckpointer() as checkpointer:
    yield checkpointer


@pytest.fixture
def keep(checkpointer, tmp_path):
  """Return a function that saves a state and returns the path."""

  def keep(state):
    checkpointer.save(tmp_path / "checkpoint", state)
    checkpointer.wait_until_finished()
    return tmp_path / "checkpoint"

  return keep


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_comes_back_bitwise(name, problem, keep, checkpointer):
  tx, (params, grads, stats) = OPTIMIZERS[name], problem
  _, state = jax.jit(tx.update)(grads, tx.init(params), params, stats=stats)
  restored = checkpointer.restore(keep(state), jax.eval_shape(tx.init, params))
  chex.assert_trees_all_equal(restored, state, strict=True)


def sharded(state, devices):
  """Return shardings that split the statistics of eight features and replicate the rest."""
  mesh = make_mesh((devices,), ("data",))
  spec = lambda x: P("data") if x.shape[:1] == (8,) else P()
  return jax.tree.map(lambda x: jax.NamedSharding(mesh, spec(x)), state)


@pytest.mark.parametrize(("before", "after"), [(8, 4), (8, 1), (1, 8)])
def test_on_another_number_of_devices(before, after, problem, second_updates, keep, checkpointer):
  """The state comes back bitwise; the next step differs by the rounding of sums over devices."""
  tx, (params, grads, stats) = OPTIMIZERS["bnp"], problem
  update = jax.jit(tx.update)
  _, state = update(grads, tx.init(params), params, stats=stats)
  path = keep(jax.device_put(state, sharded(state, before)))
  target = jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    state,
    sharded(state, after),
  )
  restored = checkpointer.restore(path, target)
  assert len(restored.statistics.input_mean["first"]["kernel"].sharding.device_set) == after
  chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(state))
  # The gradients and parameters go where the state is.
  everywhere = jax.NamedSharding(make_mesh((after,), ("data",)), P())
  actual = update(*jax.device_put((grads, restored, params), everywhere), stats=stats)
  expected = update(grads, state, params, stats=stats)
  chex.assert_trees_all_close(jax.device_get(actual), expected, rtol=1e-9, atol=1e-12)
  chex.assert_trees_all_close(actual[0], second_updates, rtol=1e-9, atol=1e-12)


# What does not belong together.


WIDER = {"first": {"kernel": np.ones((9, 4), np.float32), "bias": np.ones(4, np.float32)}}
OTHERS = {
  "another width": (lambda params: {**params, **WIDER}, r"Requested shape: \(9,\).*\(8,\)"),
  "a layer more": (lambda params: {**params, "third": WIDER["first"]}, "third"),
  "a layer less": (lambda params: {"first": params["first"]}, "input_mean.second"),
}


# Orbax leaves the reads of the other arrays to the garbage collector.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_another_model(other, problem, keep, checkpointer):
  tx, params = bnp_optax.scale_by_bnp(debias=False), problem[0]
  change, message = OTHERS[other]
  path = keep(tx.init(params))
  with pytest.raises(ValueError, match=message):
    checkpointer.restore(path, jax.eval_shape(lambda: tx.init(change(params))))
  gc.collect()


def test_a_checkpoint_of_another_optimizer(problem, keep, checkpointer):
  path = keep(bnp_optax.scale_by_bnp(debias=False).init(problem[0]))
  tx = bnp_optax.bnp(optax.sgd(0.1), debias=False)
  with pytest.raises(ValueError, match="'statistics', 'count'"):
    checkpointer.restore(path, jax.eval_shape(tx.init, problem[0]))


def test_a_checkpoint_of_an_older_version(problem, keep, checkpointer):
  """A field of the state is missing, as `nonfinite_count` was in an older version."""
  tx, params = bnp_optax.scale_by_bnp(debias=False), problem[0]
  older = tx.init(params)._asdict()
  del older["nonfinite_count"]
  with pytest.raises(ValueError, match="nonfinite_count"):
    checkpointer.restore(keep(older), jax.eval_shape(tx.init, params))


@pytest.mark.parametrize("name", ["scale_by_bnp", "chain", "bnp"])
def test_a_checkpoint_restored_without_its_structure(name, problem, keep, checkpointer):
  tx, (params, grads, stats) = OPTIMIZERS[name], problem
  restored = checkpointer.restore(keep(tx.init(params)))
  with pytest.raises(ValueError, match=r"a state that is a dict.*jax.eval_shape\(tx.init, params"):
    tx.update(grads, restored, params, stats=stats)
