"""Deep Q-learning of CartPole, with batches of 32 from a replay memory.

The environment and the agent are one compiled program. The target network is a moving average. The
score is the mean length of the episodes in the last twelfth of a run, at most 200.

python examples/dqn.py
"""

from typing import Any

import flax.linen as nn
import gallery
import jax
import jax.numpy as jnp
import optax

import bnp_optax

STEPS, BATCH, MEMORY, DISCOUNT, LIMIT, PARTS = 12_000, 32, 5_000, 0.98, 200, 12
MODEL = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(64), nn.relu, nn.Dense(2)])


def move(state: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Return the next state ``[4]`` of Gym's CartPole-v0, and whether the pole has fallen."""
  _, speed, angle, spin = state
  force = jnp.where(action == 1, 10.0, -10.0)
  push = (force + 0.05 * spin**2 * jnp.sin(angle)) / 1.1
  turn = (9.8 * jnp.sin(angle) - jnp.cos(angle) * push) / (
    0.5 * (4 / 3 - 0.1 * jnp.cos(angle) ** 2 / 1.1)
  )
  change = jnp.stack([speed, push - 0.05 * turn * jnp.cos(angle) / 1.1, spin, turn])
  state = state + 0.02 * change
  return state, (jnp.abs(state[0]) > 2.4) | (jnp.abs(state[2]) > 0.2095)


def loss_fn(params: Any, target: Any, batch: Any) -> tuple[jax.Array, Any]:
  """Return the loss on a batch, and the statistics of the network that learns."""
  state, action, following, fallen = batch
  with bnp_optax.linen.sow_statistics():
    q, aux = MODEL.apply({"params": params}, state, mutable=["intermediates"])
  future = MODEL.apply({"params": target}, following).max(axis=-1)
  goal = 1.0 + DISCOUNT * jnp.where(fallen, 0.0, future)
  chosen = jnp.take_along_axis(q, action[:, None], axis=1)[:, 0]
  return optax.huber_loss(chosen, goal).mean(), aux["intermediates"]


@gallery.side_by_side
def run(method: gallery.Method, rate: jax.Array, seed: jax.Array) -> gallery.Scores:
  """Train one agent."""
  key = jax.random.key(seed)
  params = MODEL.init(key, jnp.zeros((1, 4)))["params"]
  tx = method.optimizer(rate)
  no_state = jnp.zeros((MEMORY, 4))
  memory = (no_state, jnp.zeros(MEMORY, jnp.int32), no_state, jnp.zeros(MEMORY, bool))

  def step(carry: Any, now: Any) -> tuple[Any, jax.Array]:
    params, target, opt_state, memory, state, age = carry
    t, key = now
    keys = jax.random.split(key, 4)
    best = MODEL.apply({"params": params}, state[None])[0].argmax().astype(jnp.int32)
    explore = jax.random.uniform(keys[0]) < jnp.maximum(0.05, 1 - t / 2_000)
    action = jnp.where(explore, jax.random.randint(keys[1], (), 0, 2), best)
    following, fallen = move(state, action)
    entry = (state, action, following, fallen)
    memory = jax.tree.map(lambda m, e: m.at[t % MEMORY].set(e), memory, entry)
    drawn = jax.random.randint(keys[2], (BATCH,), 0, jnp.minimum(t + 1, MEMORY))
    batch = jax.tree.map(lambda m: m[drawn], memory)
    grads, stats = jax.grad(loss_fn, has_aux=True)(params, target, batch)
    updates, opt_state = tx.update(grads, opt_state, params, stats=stats)
    params = optax.apply_updates(params, updates)
    target = optax.incremental_update(params, target, 0.01)
    ended = fallen | (age + 1 >= LIMIT)
    fresh = jax.random.uniform(keys[3], (4,), minval=-0.05, maxval=0.05)
    carry = (params, target, opt_state, memory, jnp.where(ended, fresh, following))
    return (*carry, jnp.where(ended, 0, age + 1)), ended

  begin = (params, params, tx.init(params), memory, jnp.zeros(4), jnp.zeros((), jnp.int32))
  times = (jnp.arange(STEPS), jax.random.split(key, STEPS))
  _, ended = jax.lax.scan(step, begin, times)
  # Steps over the number of episodes that ended in each part of the run.
  lengths = (STEPS / PARTS) / jnp.maximum(ended.reshape(PARTS, -1).sum(axis=1), 1)
  lengths = jnp.minimum(lengths, float(LIMIT))
  return gallery.Scores(lengths[-1], lengths[-1], lengths)


if __name__ == "__main__":
  title = f"CartPole by Q-learning, FC 64-64, batch size {BATCH}, {STEPS:,} steps"
  gallery.compare("dqn", title, run, "steps an episode", up=True)
