"""Many devices and many processes take the steps of one device; what they send to each other."""

import collections
import functools
import itertools
import math
import re

import chex
import flax.linen as nn
import jax
from jax import lax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import bnp_optax
from tests import distributed_worker, reference
from tests.distributed_worker import BATCH_SIZE, P, bnp, make_batches, make_mesh, run_processes

STEPS = 200
PRECISIONS = {"float32": 1e-6, "float64": 1e-12}


def local(params, state, batch, tx, **kwargs):
  return distributed_worker.step(tx, params, state, batch, **kwargs)


local_loss_fn = functools.partial(distributed_worker.loss_fn, axis_name="data")


def global_loss_fn(params, batch):
  """Return the mean loss over devices, whose gradient under shard_map is the mean gradient."""
  loss, stats = local_loss_fn(params, batch)
  return lax.pmean(loss, "data"), stats


def summed_loss_fn(params, batch):
  """Return the mean loss, and the sum of the statistics of each device."""
  loss, stats = distributed_worker.loss_fn(params, batch)
  return lax.pmean(loss, "data"), lax.psum(stats, "data")


def masked_loss_fn(params, batch):
  """Return the mean loss, and the statistics of the images that have a label."""
  loss, stats = local_loss_fn(params, batch, mask=batch[1] >= 0)
  return lax.pmean(loss, "data"), stats


# Each engine of JAX: the compiled step, and a function that places a batch on the devices.


def one(step, devices):
  del devices
  return jax.jit(step), lambda batch: batch


def jitted(step, devices):
  sharding = jax.NamedSharding(make_mesh((devices,), ("data",)), P("data"))
  return jax.jit(step), lambda batch: jax.device_put(batch, sharding)


def shard_mapped(step, devices, loss_fn=global_loss_fn):
  mesh = make_mesh((devices,), ("data",))
  step = functools.partial(step, loss_fn=loss_fn)
  specs = {"in_specs": (P(), P(), P("data")), "out_specs": P()}
  return jax.jit(jax.shard_map(step, mesh=mesh, **specs)), lambda batch: batch


def pmapped(step, devices):
  average = lambda grads: lax.pmean(grads, "data")
  step = functools.partial(step, loss_fn=local_loss_fn, average=average)
  split = lambda x: x.reshape(devices, -1, *x.shape[1:])
  run = jax.pmap(
    step, "data", in_axes=(None, None, 0), out_axes=None, devices=jax.devices()[:devices]
  )
  return run, lambda batch: jax.tree.map(split, batch)


ENGINES = {"jit": jitted, "shard_map": shard_mapped, "pmap": pmapped}
# The others are slow; `jit` in float64 is below, with parameters that are split.
QUICK = [("jit", 8, "float32"), ("shard_map", 8, "float64")]


def train(engine, devices, dtype, steps=STEPS, tx=None):
  tx = bnp() if tx is None else tx
  step, place = engine(functools.partial(local, tx=tx), devices)
  carry = distributed_worker.start(tx, dtype)
  for batch in zip(*make_batches(steps, dtype), strict=True):
    # Programs of several steps at once, each on eight threads, may deadlock.
    carry = jax.block_until_ready(step(*carry, place(batch)))
  return jax.device_get(carry)


@functools.cache
def alone(dtype):
  """Return the parameters and the state after all steps on one device."""
  return train(one, 1, dtype)


def distance(tree, other):
  """Return the distance of two trees in the 2-norm, over the norm of the second."""
  chex.assert_trees_all_equal_shapes_and_dtypes(tree, other)
  flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype("float64")
  return np.linalg.norm(flat(tree) - flat(other)) / np.linalg.norm(flat(other))


@pytest.mark.slow
def test_one_device_takes_the_steps_of_the_paper():
  """The other tests compare many devices with these steps."""

  def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

  with jax.enable_x64(True):
    params, _ = distributed_worker.start(bnp(), "float64")
    expected, _ = reference.train(
      optax.chain(reference.bnp(), optax.sgd(0.02)),
      distributed_worker.CNN("float64"),
      params,
      zip(*make_batches(3, "float64"), strict=True),
      cross_entropy,
    )
    actual, _ = train(one, 1, "float64", steps=3)
    assert distance(actual, expected) <= 1e-12


@pytest.mark.slow
@pytest.mark.parametrize(
  ("engine", "devices", "dtype"),
  [
    pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
    for case in itertools.product(ENGINES, (4, 8), PRECISIONS)
  ],
)
def test_many_devices_come_to_the_same_parameters(engine, devices, dtype):
  with jax.enable_x64(dtype == "float64"):
    params, state = train(ENGINES[engine], devices, dtype)
    expected, expected_state = alone(dtype)
    assert distance(params, expected) <= PRECISIONS[dtype]
    assert state[0].count == expected_state[0].count == STEPS
    assert state[0].nonfinite_count == 0
    # The parameters moved.
    untrained, _ = distributed_worker.start(bnp(), dtype)
    assert distance(jax.device_get(untrained), expected) > 0.02


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_many_processes_come_to_the_same_parameters(processes, tmp_path):
  """From a checkpoint of one process with eight devices, and back to it."""
  with jax.enable_x64(True):
    tx, batches = bnp(), make_batches(20, "float64")
    replicated = jax.NamedSharding(make_mesh((8,), ("data",)), P())
    carry = jax.device_put(distributed_worker.start(tx, "float64"), replicated)
    np.savez(tmp_path / "batches.npz", images=batches[0], labels=batches[1])
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(tmp_path / "start", carry)
      checkpointer.wait_until_finished()
      run_processes(processes, tmp_path)
      end = checkpointer.restore(
        tmp_path / "end", jax.tree.map(ocp.utils.to_shape_dtype_struct, carry)
      )
    step, place = jitted(functools.partial(local, tx=tx), 8)
    for batch in zip(*batches, strict=True):
      carry = jax.block_until_ready(step(*carry, place(batch)))
    params, state = jax.device_get(end)
    expected, expected_state = jax.device_get(carry)
    assert distance(params, expected) <= 1e-12
    assert distance(state[0].input_mean, expected_state[0].input_mean) <= 1e-12
    assert distance(state[0].input_variance, expected_state[0].input_variance) <= 1e-12
    assert state[0].count == 20


# Statistics over devices.


def statistics_on_devices(loss_fn, params, batch, devices=8):
  """Return the statistics under shard_map, which checks that all devices have the same."""
  run = jax.shard_map(
    lambda params, batch: loss_fn(params, batch)[1],
    mesh=make_mesh((devices,), ("data",)),
    in_specs=(P(), P("data")),
    out_specs=P(),
  )
  return jax.jit(run)(params, batch)


@pytest.mark.slow
@pytest.mark.parametrize("loss_fn", [global_loss_fn, summed_loss_fn])
def test_statistics_over_devices_are_those_of_the_whole_batch(loss_fn):
  """The number of examples is that of the whole batch, too: q depends on it."""
  with jax.enable_x64(True):
    params, _ = distributed_worker.start(bnp(), "float64")
    images, labels = make_batches(1, "float64")
    batch = (images[0], labels[0])
    whole = jax.jit(lambda p, b: distributed_worker.loss_fn(p, b)[1])(params, batch)
    split = statistics_on_devices(loss_fn, params, batch)
    for name, positions in {"first": 16, "second": 16, "head": 1}.items():
      a, b = (stats[name]["layer_statistics"] for stats in (split, whole))
      assert (a.examples, a.rows) == (BATCH_SIZE, BATCH_SIZE * positions)
      assert (b.examples, b.rows) == (a.examples, a.rows)
      np.testing.assert_allclose(a.mean, b.mean, rtol=1e-13)
      np.testing.assert_allclose(a.variance, b.variance, rtol=1e-11, atol=1e-16)


def test_padding_is_counted_over_all_devices():
  """Of two images a device, the first has none that counts, and the second has one."""
  with jax.enable_x64(True):
    params, _ = distributed_worker.start(bnp(), "float64")
    images, labels = (x[0] for x in make_batches(1, "float64"))
    counts = np.arange(BATCH_SIZE) >= 3
    padded = (np.where(counts[:, None, None, None], images, np.nan), np.where(counts, labels, -1))
    whole = jax.jit(lambda p, b: distributed_worker.loss_fn(p, b)[1])
    expected = whole(params, (images[counts], labels[counts]))
    actual = statistics_on_devices(masked_loss_fn, params, padded)
    chex.assert_trees_all_close(actual, expected, rtol=1e-11, atol=1e-14)
    assert actual["head"]["layer_statistics"].examples == BATCH_SIZE - 3


def test_statistics_of_one_device_alone_are_refused_by_shard_map():
  """A forgotten axis_name is an error of JAX, which names the axis."""

  def forgetful(params, batch):
    loss, stats = distributed_worker.loss_fn(params, batch)
    return lax.pmean(loss, "data"), stats

  tx = bnp()
  carry = distributed_worker.start(tx, "float32")
  images, labels = make_batches(1, "float32")
  step = functools.partial(local, tx=tx, loss_fn=forgetful)
  mesh, specs = make_mesh((8,), ("data",)), {"in_specs": (P(), P(), P("data")), "out_specs": P()}
  with pytest.raises(ValueError, match="given out_specs"):
    jax.eval_shape(jax.shard_map(step, mesh=mesh, **specs), *carry, (images[0], labels[0]))


# Parameters and state that are split too.


def run_sharded(specs, mesh, tx, steps=10):
  """Trains with parameters split as `specs` say, and the state as docs/distributed.md says."""
  params, _ = distributed_worker.start(tx, "float64")
  sharding = lambda spec: jax.NamedSharding(mesh, spec)
  params = jax.tree.map(lambda p, spec: jax.device_put(p, sharding(spec)), params, specs)
  split = lambda x: isinstance(x.sharding, jax.NamedSharding)
  state = jax.tree.map(
    lambda x: x if split(x) else jax.device_put(x, sharding(P())), tx.init(params)
  )
  step = jax.jit(
    functools.partial(local, tx=tx),
    out_shardings=jax.tree.map(lambda x: x.sharding, (params, state)),
  )
  for batch in zip(*make_batches(steps, "float64"), strict=True):
    batch = jax.device_put(batch, sharding(P("data")))
    params, state = jax.block_until_ready(step(params, state, batch))
  return params, state


SPECS = {
  # FSDP: parameters are split over the axis that splits the batch.
  "fsdp": (
    (8,),
    ("data",),
    {
      "first": {"kernel": P(), "bias": P()},
      "second": {"kernel": P(None, None, None, "data")},
      "head": {"kernel": P("data"), "bias": P()},
    },
  ),
  # Tensor parallel: one convolution by its outputs, the next one by its inputs.
  "tensor parallel": (
    (2, 4),
    ("data", "model"),
    {
      "first": {"kernel": P(None, None, None, "model"), "bias": P("model")},
      "second": {"kernel": P(None, None, "model", None)},
      "head": {"kernel": P("model"), "bias": P()},
    },
  ),
}


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("kind", ["fsdp", pytest.param("tensor parallel", marks=pytest.mark.slow)])
def test_parameters_and_state_that_are_split(kind):
  shape, axes, specs = SPECS[kind]
  # SGD with momentum keeps a state for each parameter, split as the parameter is.
  tx = bnp_optax.bnp(optax.sgd(0.05, momentum=0.9), debias=False)
  with jax.enable_x64(True):
    mesh = make_mesh(shape, axes)
    params, state = run_sharded(specs, mesh, tx)
    expected, _ = train(one, 1, "float64", steps=10, tx=tx)
    assert distance(jax.device_get(params), expected) <= 1e-12
    for tree in (params, optax.tree.get(state, "trace")):
      jax.tree.map(lambda x, spec: chex.assert_equal(x.sharding.spec, spec), tree, specs)
    assert all(x.is_fully_replicated for x in jax.tree.leaves(state.statistics))


# Communication.


def communication(compiled):
  """Return the operands of the collectives of a compiled program: `[(dtype, shape)]`."""
  number = (
    r"all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
  )
  found = []
  for line in compiled.as_text().splitlines():
    if match := re.search(rf"= (.*?) (?:{number})(?:-start)?\(", line):
      for dtype, shape in re.findall(r"([a-z]+\d+)\[([\d,]*)\]", match[1]):
        found.append((dtype, tuple(map(int, filter(None, shape.split(","))))))
  return found


def compiled_step(engine, tx, devices=8):
  step, place = engine(functools.partial(local, tx=optax.with_extra_args_support(tx)), devices)
  images, labels = make_batches(1, "float32")
  return step.lower(
    *distributed_worker.start(tx, "float32"), place((images[0], labels[0]))
  ).compile()


@pytest.mark.slow
@pytest.mark.parametrize(
  ("engine", "vectors", "scalars"),
  [
    pytest.param(jitted, 2, 0, id="jit"),
    pytest.param(shard_mapped, 2, 0, id="shard_map"),
    pytest.param(functools.partial(shard_mapped, loss_fn=masked_loss_fn), 2, 2, id="mask"),
    pytest.param(functools.partial(shard_mapped, loss_fn=summed_loss_fn), 3, 2, id="psum"),
    pytest.param(pmapped, 2, 0, id="pmap"),
  ],
)
def test_communication_added_by_bnp(engine, vectors, scalars):
  """Two vectors a layer, and three where devices add sums about their own means."""
  sizes = lambda tx: collections.Counter(
    math.prod(shape) for _, shape in communication(compiled_step(engine, tx))
  )
  sgd, with_bnp = sizes(optax.sgd(0.02)), sizes(bnp())
  parameters, _ = distributed_worker.start(bnp(), "float32")
  # Plain SGD carries the gradients; the loss, of which nothing is made here, not even that.
  assert sgd == collections.Counter(math.prod(p.shape) for p in jax.tree.leaves(parameters))
  features = {"first": 1, "second": 4, "head": 128}
  allowed = collections.Counter({n: vectors for n in features.values()})
  allowed[1] += scalars * len(features)
  assert (with_bnp - sgd).total() > 0
  assert with_bnp - sgd <= allowed


class Boxed(nn.Module):
  """A network whose parameters have partitioning metadata."""

  @nn.compact
  def __call__(self, x):
    kernel = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    bias = nn.with_partitioning(nn.initializers.zeros, ("model",))
    x = nn.relu(nn.Dense(8, kernel_init=kernel, bias_init=bias, name="hidden")(x))
    return nn.Dense(3, name="head")(x)


@pytest.mark.slow
@pytest.mark.parametrize(
  "make",
  [
    lambda: optax.chain(bnp_optax.scale_by_bnp(), optax.sgd(0.1)),
    lambda: bnp_optax.bnp(optax.sgd(0.1, momentum=0.9)),
  ],
)
def test_parameters_with_partitioning_metadata(make):
  """The vectors of the state have no such metadata, and the steps do not depend on it."""
  mesh, model, tx = make_mesh((2, 4), ("data", "model")), Boxed(), make()
  x = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)

  def step(params, state):
    def loss_fn(params):
      with bnp_optax.linen.sow_statistics():
        y, aux = model.apply({"params": params}, x, mutable=["intermediates"])
      return (y**2).mean(), aux["intermediates"]

    grads, stats = jax.grad(loss_fn, has_aux=True)(params)
    updates, state = tx.update(grads, state, params, stats=stats)
    return optax.apply_updates(params, updates), state

  boxed = jax.jit(model.init)(jax.random.key(0), x)["params"]
  plain = nn.meta.unbox(boxed)
  expected, state = plain, tx.init(plain)
  for _ in range(2):
    expected, state = jax.jit(step)(expected, state)

  shapes = jax.eval_shape(tx.init, boxed)
  with jax.set_mesh(mesh):
    state = jax.jit(tx.init, out_shardings=nn.get_sharding(shapes, mesh))(boxed)
    actual = boxed
    for _ in range(2):
      actual, state = jax.jit(step)(actual, state)
  chex.assert_trees_all_close(jax.device_get(nn.meta.unbox(actual)), expected, rtol=1e-5, atol=1e-7)
  (statistics,) = (
    s
    for s in jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, bnp_optax.ScaleByBnpState))
    if isinstance(s, bnp_optax.ScaleByBnpState)
  )
  assert isinstance(statistics.input_mean["hidden"]["kernel"], jax.Array)
  assert isinstance(statistics.input_mean["hidden"]["bias"], optax.MaskedNode)
