"""Masks and numbers of examples in recurrent layers, whose cells get one time step at a time."""

import chex
from flax import nnx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnp_optax
from bnp_optax.nnx import Statistics
from tests import problems
from tests.test_linen import check, init, sow
from tests.test_taps import from_taps

pytestmark = pytest.mark.usefixtures("x64")

N, T, D, H = 5, 6, 3, 4
LENGTHS = np.array([1, 2, 3, 6, 4])
MASK = np.arange(T) < LENGTHS[:, None]
F64 = {"dtype": jnp.float64, "param_dtype": jnp.float64}
STATE_AXES = nnx.StateAxes({Statistics: 0, ...: nnx.Carry})


class ZeroCarry(nn.RNNCellBase):
  """A cell whose carry is ``[batch, H]``."""

  @nn.nowrap
  def initialize_carry(self, rng, input_shape):
    return jnp.zeros((*input_shape[: -self.num_feature_axes], H))


def sequences(*features, seed=0):
  return np.random.default_rng(seed).normal(size=(N, T, *features))


def cell_inputs(params, x, order):
  """Return the inputs of a SimpleCell and its states before each step, in the order of ``x``.

  Args:
    params: ``(kernel of the inputs, its bias, kernel of the state)``.
    x: ``[batch, time, features]``.
    order: For each sequence, the positions in the order of the steps.
  """
  wi, b, wh = (np.asarray(p, np.float64) for p in params)
  states = np.zeros((N, T, H))
  for n in range(N):
    h = np.zeros(H)
    for t in order[n]:
      states[n, t] = h
      h = np.tanh(x[n, t] @ wi + b + h @ wh)
  return states


FORWARD = [list(range(T))] * N
BACKWARD = [list(range(T))[::-1]] * N
# With lengths, the padding stays at the end.
BACKWARD_WITHIN = [[*range(n - 1, -1, -1), *range(T - 1, n - 1, -1)] for n in map(int, LENGTHS)]

OPTIONS = {
  "forward": ({}, {}, FORWARD),
  "unrolled": ({"unroll": 2}, {}, FORWARD),
  "time first": ({"time_major": True}, {}, FORWARD),
  "time first in the call": ({}, {"time_major": True}, FORWARD),
  "backward": ({"reverse": True}, {}, BACKWARD),
  "backward in order": ({"reverse": True, "keep_order": True}, {}, BACKWARD),
  "time first, backward": ({"time_major": True}, {"reverse": True}, BACKWARD),
  "with lengths": ({}, {"seq_lengths": LENGTHS}, FORWARD),
  "backward with lengths": ({"reverse": True}, {"seq_lengths": LENGTHS}, BACKWARD_WITHIN),
  "time first, backward with lengths": (
    {"time_major": True, "return_carry": True},
    {"reverse": True, "seq_lengths": LENGTHS},
    BACKWARD_WITHIN,
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize("example_axes", [1, 2])
@pytest.mark.parametrize("framework", ["linen", "nnx"])
@pytest.mark.parametrize("name", OPTIONS)
def test_single_steps_are_left_out(framework, name, example_axes):
  options, arguments, order = OPTIONS[name]
  x = sequences(D)
  time_major = options.get("time_major") or arguments.get("time_major")
  inputs = np.swapaxes(x, 0, 1) if time_major else x
  context = {"mask": MASK, "example_axes": example_axes}
  if framework == "linen":
    model = nn.RNN(nn.SimpleCell(H, name="cell", **F64), **options)
    params = init(model, inputs)
    stats = sow(model, params, inputs, context=context, **arguments)["cell"]
    i, h, cell = stats["i"], stats["h"], params["cell"]
    weights = cell["i"]["kernel"], cell["i"]["bias"], cell["h"]["kernel"]
  else:
    cell = nnx.SimpleCell(D, H, rngs=nnx.Rngs(0), **F64)
    model = nnx.RNN(cell, **options)

    @nnx.jit
    def forward(model, inputs):
      with bnp_optax.nnx.sow_statistics(**context):
        return nnx.capture(model, Statistics)(inputs, **arguments)[1]

    stats = nnx.to_pure_dict(forward(model, inputs))["cell"]
    stats = bnp_optax.merge_calls(stats)
    i, h = stats["dense_i"], stats["dense_h"]
    weights = cell.dense_i.kernel[...], cell.dense_i.bias[...], cell.dense_h.kernel[...]
  examples = N if example_axes == 1 else int(LENGTHS.sum())
  states = cell_inputs(weights, x, order)
  check(i["layer_statistics"], x[MASK], examples=examples, tolerance=1e-12)
  check(h["layer_statistics"], states[MASK], examples=examples, tolerance=1e-12)


def square(y):
  return jnp.mean(jnp.where(MASK[..., None], y, 0) ** 2)


def linen_update(x):
  model = nn.RNN(nn.LSTMCell(H, **F64))
  tx = bnp_optax.scale_by_bnp(layers=bnp_optax.linen.layers(model, x))

  def loss_fn(params):
    with bnp_optax.linen.sow_statistics(mask=MASK):
      y, aux = model.apply({"params": params}, x, mutable=["intermediates"])
    return square(y), aux["intermediates"]

  @jax.jit
  def step(params):
    grads, stats = jax.grad(loss_fn, has_aux=True)(params)
    return tx.update(grads, tx.init(params), stats=stats)[0]

  return step(init(model, x))


def nnx_update(x):
  model = nnx.RNN(nnx.LSTMCell(D, H, rngs=nnx.Rngs(0), **F64), state_axes=STATE_AXES)
  tx = bnp_optax.scale_by_bnp(layers=bnp_optax.nnx.layers(model, x))

  def loss_fn(model):
    with bnp_optax.nnx.sow_statistics(mask=MASK):
      y, stats = nnx.capture(model, Statistics)(x)
    return square(y), stats

  @nnx.jit
  def step(model):
    grads, stats = nnx.grad(loss_fn, has_aux=True)(model)
    return tx.update(grads, tx.init(nnx.state(model, nnx.Param)), stats=stats)[0]

  return step(model)


@pytest.mark.slow
@pytest.mark.parametrize("update", [linen_update, nnx_update])
def test_the_step_does_not_depend_on_the_padding(update):
  zeros, others = (update(np.where(MASK[..., None], sequences(D), x)) for x in (0.0, 100.0))
  chex.assert_trees_all_equal(zeros, others)


def test_sequences_count_once_wherever_their_steps_lie():
  """No step has positions of every sequence that counts."""
  mask = np.zeros((N, T), bool)
  mask[[0, 1, 2], [1, 3, 5]] = True
  model, x = nn.RNN(nn.SimpleCell(H, name="cell", **F64)), sequences(D)
  stats = sow(model, init(model, x), x, context={"mask": mask})["cell"]["i"]
  check(stats["layer_statistics"], x[mask], examples=3, tolerance=1e-12)


def test_a_mask_of_whole_sequences():
  model, x, mask = nn.RNN(nn.SimpleCell(H, name="cell", **F64)), sequences(D), LENGTHS > 2
  stats = sow(model, init(model, x), x, context={"mask": mask})["cell"]["i"]
  check(stats["layer_statistics"], x[mask], examples=3, tolerance=1e-12)


class Model(nn.Module):
  """A layer before the loop over time, both directions of it, and a head after it."""

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(D, name="embed", **F64)(x)
    rnns = [nn.RNN(nn.GRUCell(H, name=name, **F64)) for name in ("first", "second")]
    return nn.Dense(2, name="head", **F64)(nn.Bidirectional(*rnns)(x, seq_lengths=LENGTHS))


@pytest.mark.slow
def test_layers_in_and_around_a_loop_count_the_same():
  model, x = Model(), sequences(D)
  params = init(model, x)
  for mask, rows in ((None, N * T), (MASK, int(LENGTHS.sum()))):
    stats = sow(model, params, x, context={"example_axes": 2, "mask": mask})
    leaves = jax.tree.leaves(stats, is_leaf=lambda x: isinstance(x, bnp_optax.LayerStatistics))
    found = {(int(s.examples), int(s.rows)) for s in leaves}
    assert found == {(rows, rows)}, found


def test_masks_by_prefix():
  model, x = Model(), sequences(D)
  stats = sow(model, init(model, x), x, context={"mask": {"first": MASK}, "examples": 7})
  assert stats["first"]["in"]["layer_statistics"].rows == int(LENGTHS.sum())
  assert stats["second"]["in"]["layer_statistics"].rows == N * T


@pytest.mark.parametrize("ndim", [2, 3, 4])
def test_masks_of_maps_in_a_convolutional_cell(ndim):
  x = sequences(4, 5, 2)
  mask = np.random.default_rng(1).uniform(size=x.shape[:ndim]) < 0.6
  model = nn.RNN(nn.ConvLSTMCell(H, (3, 3), name="cell", **F64))
  stats = sow(model, init(model, x), x, context={"mask": mask})["cell"]["ih"]["layer_statistics"]
  # Each row of H is a position of the output map; the inputs have the same ones.
  check(stats, x[mask], examples=int(mask.any(tuple(range(1, ndim))).sum()), tolerance=1e-12)


def test_a_recurrent_layer_inside_a_cell():
  class Outer(ZeroCarry):
    num_feature_axes = 2

    @nn.compact
    def __call__(self, carry, x):  # [batch, time, features]
      words = nn.RNN(nn.SimpleCell(H, name="words", **F64), reverse=True)(x)
      carry = carry + words[:, -1]
      return carry, nn.Dense(2, name="out", **F64)(carry)

  x = sequences(3, D)
  mask = np.random.default_rng(2).uniform(size=(N, T, 3)) < 0.5
  model = nn.RNN(Outer())
  stats = sow(model, init(model, x), x, context={"mask": mask})["cell"]
  examples = int(mask.any((1, 2)).sum())
  check(stats["words"]["i"]["layer_statistics"], x[mask], examples=examples, tolerance=1e-12)
  assert stats["out"]["layer_statistics"].rows == int(mask.any(2).sum())


@pytest.mark.parametrize("transform", [nn.remat, nn.jit])
def test_transformed_cells(transform):
  model = nn.RNN(transform(nn.SimpleCell)(H, name="cell", **F64))
  x = sequences(D)
  params = init(model, x)
  for mask in (MASK, ~MASK):
    stats = sow(model, params, x, context={"mask": mask})["cell"]["i"]["layer_statistics"]
    check(stats, x[mask], examples=int(mask.any(1).sum()), tolerance=1e-12)


def test_mapped_sequences():
  """`jax.vmap` over examples: the layer gets single sequences."""
  model, x = nn.RNN(nn.SimpleCell(H, name="cell", **F64)), sequences(D)
  params = init(model, x[0])

  @jax.jit
  @jax.vmap
  def forward(x, mask):
    with bnp_optax.linen.sow_statistics(mask=mask, example_axes=0):
      return model.apply({"params": params}, x, mutable=["intermediates"])[1]["intermediates"]

  stats = jax.tree.map(lambda s: jnp.sum(s, 0), forward(x, MASK))["cell"]["i"]
  check(stats["layer_statistics"], x[MASK], examples=N, tolerance=1e-12)


def test_a_mask_of_another_length_is_an_error():
  model, x = nn.RNN(nn.SimpleCell(H, name="cell", **F64)), sequences(D)
  params = init(model, x)
  context = {"mask": MASK[:, :-1]}
  problems.raises(
    r"Layer cell/i: the mask of shape \(5, 5\) does not fit", sow, model, params, x, context=context
  )


def test_interceptors_get_arrays():
  found = []

  def interceptor(next_fun, args, kwargs, context):
    found.extend(
      type(context.module).__name__ for x in args if not isinstance(x, jax.Array | tuple)
    )
    return next_fun(*args, **kwargs)

  model, x = nn.RNN(nn.LSTMCell(H, name="cell", **F64)), jnp.asarray(sequences(D))
  params = init(model, x)
  with nn.intercept_methods(interceptor):
    sow(model, params, x, context={"mask": MASK})
  assert not found


class Cell(nnx.SimpleCell):
  """A cell of a class that inherits its call, and has a layer that is registered."""


class Projection(nnx.Module):
  """A cell that is a linear layer itself."""

  num_feature_axes = 1

  def __init__(self, rngs):
    self.kernel = nnx.Param(rngs.normal((D, H), jnp.float64))

  def initialize_carry(self, input_shape, rngs=None):
    del rngs
    return jnp.zeros((*input_shape[:-1], H))

  def __call__(self, carry, x):
    carry = carry + x @ self.kernel[...]
    return carry, carry


bnp_optax.nnx.register(Projection, lambda layer, carry, x: (x, "...d,df->...f"), bias=None)


@pytest.mark.parametrize(
  ("cell", "layer"),
  [(lambda rngs: Cell(D, H, rngs=rngs, **F64), "dense_i"), (Projection, None)],
  ids=["inherits", "registered"],
)
def test_nnx_cells_of_other_classes(cell, layer):
  model = nnx.RNN(cell(nnx.Rngs(0)))
  x = jnp.asarray(sequences(D))
  with bnp_optax.nnx.sow_statistics(mask=MASK):
    stats = nnx.to_pure_dict(nnx.capture(model, Statistics)(x)[1])["cell"]
  stats = stats[layer] if layer else stats
  merged = bnp_optax.merge_calls(stats["layer_statistics"])
  check(merged, x[MASK], examples=N, tolerance=1e-12)
  # The classes are as before.
  assert "call" not in {
    nnx.RNN.__call__.__code__.co_name,
    type(model.cell).__call__.__code__.co_name,
  }


def test_a_jitted_nnx_cell():
  """Its second loop has another index."""

  class Jitted(nnx.SimpleCell):
    @nnx.jit
    def __call__(self, carry, inputs):
      return super().__call__(carry, inputs)

  model = nnx.RNN(Jitted(D, H, rngs=nnx.Rngs(0), **F64), state_axes=STATE_AXES)
  x = jnp.asarray(sequences(D))
  for _ in range(2):
    with bnp_optax.nnx.sow_statistics(mask=MASK):
      stats = nnx.to_pure_dict(nnx.capture(model, Statistics)(x)[1])["cell"]["dense_i"]
    merged = bnp_optax.merge_calls(stats["layer_statistics"])
    check(merged, x[MASK], examples=N, tolerance=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_tapped_counts_the_steps_of_a_loop(framework):
  x = jnp.asarray(sequences(D))
  if framework == "linen":
    tapped = bnp_optax.linen.Tapped(nn.RNN(nn.SimpleCell(H, **F64)), examples=N * T, example_axes=2)
    params = tapped.init(jax.random.key(0), x)
    grads = jax.grad(lambda p: jnp.mean(tapped.apply(p, x) ** 2))(params)
  else:
    rnn = nnx.RNN(nnx.SimpleCell(D, H, rngs=nnx.Rngs(0), **F64))
    tapped = bnp_optax.nnx.Tapped(rnn, x, examples=N * T, example_axes=2)
    grads = nnx.grad(lambda model: jnp.mean(model(x) ** 2))(tapped)
  stats = from_taps(grads)
  assert {(int(s.examples), int(s.rows)) for s in stats.values()} == {(N * T, N * T)}


def test_positions_of_the_table_with_the_time_first():
  model, x = nn.RNN(nn.SimpleCell(H, **F64), time_major=True), np.swapaxes(sequences(D), 0, 1)
  assert {entry.positions for entry in bnp_optax.linen.layers(model, x).entries} == {T}


# Contexts, and layers that get something else than a step of the batch.


class Words(ZeroCarry):
  """A cell for ``[batch, words, features]`` with a context of its own for the mask of the words."""

  num_feature_axes = 2

  @nn.compact
  def __call__(self, carry, x):
    mask = x[..., 0] > 0
    with bnp_optax.linen.sow_statistics(mask=mask, example_axes=2):
      y = nn.Dense(H, name="words", **F64)(x)
    return carry + jnp.where(mask[..., None], y, 0).sum(-2), carry


@pytest.mark.parametrize("words", [3, T])
def test_a_context_inside_a_cell(words):
  """Its mask is that of the inputs there, also if it has the shape of a mask over time."""
  x, model = sequences(words, D), nn.RNN(Words())
  stats = sow(model, init(model, x), x)["cell"]["words"]["layer_statistics"]
  valid = x[x[..., 0] > 0]
  examples = (x[..., 0] > 0).sum((0, 2)).max()
  check(stats, valid, examples=int(examples), tolerance=1e-12)


class NnxWords(nnx.Module):
  num_feature_axes = 2

  def __init__(self, rngs):
    self.words = nnx.Linear(D, H, rngs=rngs, **F64)

  def initialize_carry(self, input_shape, rngs=None):
    del rngs
    return jnp.zeros((*input_shape[:-2], H))

  def __call__(self, carry, x):
    with bnp_optax.nnx.sow_statistics(mask=x[..., 0] > 0, examples=N):
      y = self.words(x)
    return carry + y.sum(-2), carry


@pytest.mark.parametrize("words", [3, T])
def test_a_context_inside_an_nnx_cell(words):
  x, model = sequences(words, D), nnx.RNN(NnxWords(nnx.Rngs(0)), state_axes=STATE_AXES)
  with bnp_optax.nnx.sow_statistics():
    stats = nnx.to_pure_dict(nnx.capture(model, Statistics)(jnp.asarray(x))[1])["cell"]["words"]
  merged = bnp_optax.merge_calls(stats["layer_statistics"])
  check(merged, x[x[..., 0] > 0], examples=N, tolerance=1e-12)


class Mapped(ZeroCarry):
  """A cell that maps a layer over the batch, which then gets ``[words, features]``."""

  num_feature_axes = 2

  @nn.compact
  def __call__(self, carry, x):
    dense = nn.vmap(nn.Dense, variable_axes={"params": None}, split_rngs={"params": False})
    return carry + dense(H, name="words", **F64)(x).sum(-2), carry


@pytest.mark.parametrize("words", [3, N])
def test_a_part_of_the_batch_inside_a_cell(words):
  x, model = sequences(words, D), nn.RNN(Mapped())
  params = init(model, x)
  context = {"mask": MASK, "examples": N}
  match = r"Layer cell/words: the mask of shape \(5, 6\) has more axes than its inputs"
  problems.raises(match, sow, model, params, x, context=context)


def test_a_recurrent_layer_with_a_part_of_the_batch():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):  # [words, batch, time, features]
      rnn = nn.vmap(nn.RNN, variable_axes={"params": None}, split_rngs={"params": False})
      return rnn(nn.SimpleCell(H, **F64), name="rnn")(x)

  x = np.stack([sequences(D)] * 2)
  params, context = init(Model(), x), {"mask": np.stack([MASK] * 2, -1), "examples": N}
  match = r"mask of shape \(5, 6, 2\) has more axes than its inputs"
  problems.raises(match, sow, Model(), params, x, context=context)


class Memory(ZeroCarry):
  """A cell with a layer whose inputs are not those of the batch, or lead with another axis."""

  first: bool = False

  num_feature_axes = 1

  @nn.compact
  def __call__(self, carry, x):
    inputs = x[None] if self.first else jnp.ones((7, D))
    return carry + nn.Dense(H, name="memory", **F64)(inputs).sum(), carry


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("mask", [MASK, LENGTHS > 2])
def test_inputs_without_the_batch_of_the_step(first, mask):
  model, x = nn.RNN(Memory(first)), sequences(D)
  match = "Layer cell/memory: its inputs of shape .* do not begin with the batch of the recurrent"
  context = {"mask": mask, "examples": N}
  problems.raises(match, sow, model, init(model, x), x, context=context)


def test_the_mask_of_a_memory():
  """A layer of the cell gets ``[batch, source, features]`` in each step."""
  memory = np.random.default_rng(3).normal(size=(N, 7, D))
  valid = np.arange(7) < np.array([[3], [7], [1], [5], [2]])

  class Attention(nn.SimpleCell):
    @nn.compact
    def __call__(self, carry, x):
      keys = nn.Dense(H, name="keys", **F64)(memory)
      carry = carry + jnp.where(valid[..., None], keys, 0).sum(1)
      return carry, nn.Dense(H, name="out", **F64)(carry)

  model, x = nn.RNN(Attention(H, **F64)), sequences(D)
  mask = {"": MASK, "cell/keys": MASK[..., None] & valid[:, None]}
  stats = sow(model, init(model, x), x, context={"mask": mask})["cell"]
  rows = [memory[n][valid[n]] for n in range(N) for t in range(T) if MASK[n, t]]
  check(stats["keys"]["layer_statistics"], np.concatenate(rows), examples=N, tolerance=1e-12)
  assert stats["out"]["layer_statistics"].rows == int(LENGTHS.sum())


@pytest.mark.slow
@pytest.mark.parametrize("mask", [None, MASK], ids=["plain", "mask"])
def test_eager_calls_reuse_the_programs_of_a_loop(mask, caplog):
  model, x = nn.RNN(nn.SimpleCell(H, name="cell", **F64)), jnp.asarray(sequences(D))
  params = init(model, x)
  for _ in range(3):
    caplog.clear()
    with bnp_optax.linen.sow_statistics(mask=mask), jax.log_compiles():
      model.apply({"params": params}, x, mutable=["intermediates"])
  compiled = [r for r in caplog.records if "Finished XLA compilation" in r.getMessage()]
  # The loop itself is a new function in each call of nn.RNN.
  assert len(compiled) == 1, compiled


def test_tapped_does_not_count_time_steps_as_examples():
  rnn, x = nn.RNN(nn.SimpleCell(H, **F64), time_major=True), np.swapaxes(sequences(D), 0, 1)
  tapped = bnp_optax.linen.Tapped(rnn, examples=N)
  params = tapped.init(jax.random.key(0), x)
  problems.raises("Tapped counts the 6 time steps as examples", tapped.apply, params, x)


# Other loops.


class Loop(nn.Module):
  """A loop over time that calls its layers with one step."""

  own_context: bool = False

  @nn.compact
  def __call__(self, x, mask):
    class Step(nn.Module):
      own_context: bool

      @nn.compact
      def __call__(self, carry, step):
        x, mask = step
        layer = nn.Dense(H, name="layer", **F64)
        if self.own_context:
          with bnp_optax.linen.sow_statistics(mask=mask, examples=N):
            return carry, layer(x)
        return carry, layer(x)

    steps = nn.scan(Step, variable_broadcast="params", split_rngs={"params": False}, in_axes=1)
    return steps(self.own_context, name="steps")((), (x, mask))


def test_the_mask_of_another_loop_is_refused():
  x = sequences(D)
  params = init(Loop(), x, MASK)
  problems.raises(
    "Layer steps/layer: the mask of shape .5, 6. has more axes than its inputs of shape .5, 3.",
    sow,
    Loop(),
    params,
    x,
    MASK,
    context={"mask": MASK},
  )
  stats = sow(Loop(), params, x, MASK, context={"mask": LENGTHS > 2})["steps"]["layer"]
  check(stats["layer_statistics"], x[LENGTHS > 2], examples=3, tolerance=1e-12)


def test_the_mask_of_a_step_within_another_loop():
  x, model = sequences(D), Loop(own_context=True)
  stats = sow(model, init(model, x, MASK), x, MASK)["steps"]["layer"]["layer_statistics"]
  check(stats, x[MASK], examples=N, tolerance=1e-12)
