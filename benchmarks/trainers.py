"""BNP in trainers that own the training step: sbx and numpyro.

The trainers are not edited. They get a `Tapped` model, and BNP as the optimizer.

  pip install sbx-rl numpyro
  python benchmarks/trainers.py dqn ppo sac svi --seeds 5
"""

import argparse
from collections.abc import Callable
import statistics
import tempfile
from typing import Any
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import bnp_optax

OPTIMIZERS = {
  "adam": lambda learning_rate: optax.adam(learning_rate),
  "bnp(adam)": lambda learning_rate: bnp_optax.bnp(optax.adam(learning_rate), debias=True),
}
# SAC has two critics, whose kernels are stacked.
DENSE = bnp_optax.KernelLayout()
SAC_LAYERS = {("params", f"Dense_{i}", "kernel"): DENSE for i in range(4)} | {
  ("params", "VmapContinuousCritic_0", f"Dense_{i}", "kernel"): DENSE.stacked([0]) for i in range(3)
}


def tapped(model_class: Any, examples: int) -> Callable[..., Any]:
  """Return a function that makes a tapped model of a class."""
  return lambda *args, **kwargs: bnp_optax.linen.Tapped(
    model_class(*args, **kwargs), examples=examples
  )


def train(model: Any, steps: int) -> float:
  """Return the mean return over 10 episodes after training."""
  from stable_baselines3.common.evaluation import evaluate_policy

  return evaluate_policy(model.learn(steps), model.get_env(), 10)[0]


def ppo(optimizer: str, seed: int) -> float:
  """Return the mean return of PPO on CartPole after 10,240 steps."""
  import sbx
  from sbx.ppo.policies import Actor, Critic

  policy = {"optimizer_class": OPTIMIZERS[optimizer]}
  if optimizer != "adam":
    policy |= {"actor_class": tapped(Actor, 64), "critic_class": tapped(Critic, 64)}
  return train(sbx.PPO("MlpPolicy", "CartPole-v1", 3e-4, policy_kwargs=policy, seed=seed), 10_240)


def dqn(optimizer: str, seed: int) -> float:
  """Return the mean return of DQN on CartPole after 10,000 steps."""
  import sbx
  from sbx.dqn import policies

  network = policies.QNetwork
  if optimizer != "adam":
    policies.QNetwork = tapped(network, 64)
  try:
    model = sbx.DQN(
      *("MlpPolicy", "CartPole-v1", 1e-3),
      batch_size=64,
      learning_starts=1000,
      target_update_interval=200,
      exploration_fraction=0.2,
      exploration_final_eps=0.04,
      policy_kwargs={"optimizer_class": OPTIMIZERS[optimizer], "net_arch": [64]},
      seed=seed,
    )
  finally:
    policies.QNetwork = network
  return train(model, 10_000)


def sac(optimizer: str, seed: int) -> float:
  """Return the mean return of SAC on Pendulum after 3,000 steps."""
  import sbx
  from sbx.sac.policies import SquashedGaussianActor, VectorCritic

  policy = {"optimizer_class": OPTIMIZERS[optimizer], "net_arch": [64, 64]}
  if optimizer != "adam":
    policy["optimizer_class"] = lambda learning_rate: bnp_optax.bnp(
      optax.adam(learning_rate), debias=True, layers=SAC_LAYERS
    )
    policy["actor_class"] = tapped(SquashedGaussianActor, 256)
    policy["vector_critic_class"] = tapped(VectorCritic, 256)
  model = sbx.SAC("MlpPolicy", "Pendulum-v1", 1e-3, policy_kwargs=policy, seed=seed)
  return train(model, 3_000)


class Net(nn.Module):
  """A regression network."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Return a prediction for each example."""
    for _ in range(2):
      x = nn.tanh(nn.Dense(50)(x))
    return nn.Dense(1)(x)[:, 0]


def svi(optimizer: str, seed: int) -> float:
  """Return the negative ELBO of a regression after 1,000 steps of SVI, per example."""
  import numpyro
  from numpyro.contrib.module import flax_module

  network = Net() if optimizer == "adam" else tapped(Net, 256)()
  x = 3 + jax.random.normal(jax.random.key(0), (256, 4))
  y = jnp.sin(3 * x[:, 0]) * x[:, 1] + x[:, 2]

  def model(x: jax.Array, y: jax.Array) -> None:
    net = flax_module("net", network, x)
    noise = numpyro.sample("noise", numpyro.distributions.LogNormal(-1.0, 1.0))
    numpyro.sample("y", numpyro.distributions.Normal(net(x), noise), obs=y)

  guide = numpyro.infer.autoguide.AutoNormal(model)
  adam = numpyro.optim.optax_to_numpyro(OPTIMIZERS[optimizer](3e-3))
  inference = numpyro.infer.SVI(model, guide, adam, numpyro.infer.Trace_ELBO())
  losses = inference.run(jax.random.key(seed), 1_000, x, y, progress_bar=False).losses
  return float(jnp.mean(losses[-100:])) / len(x)


def main() -> None:
  """Print the result of each trainer with each optimizer, and the mean over seeds."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("trainers", nargs="+", choices=["dqn", "ppo", "sac", "svi"])
  parser.add_argument("--seeds", type=int, default=5)
  args = parser.parse_args()
  warnings.simplefilter("ignore")
  # Every run traces its step again; the programs of all seeds are the same.
  jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp())
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  for name in args.trainers:
    for optimizer in OPTIMIZERS:
      results = []
      for seed in range(args.seeds):
        results.append(float(globals()[name](optimizer, seed)))
      shown = " ".join(f"{x:.4g}" for x in results)
      print(f"{name:4} {optimizer:10} mean {statistics.mean(results):.4g}: {shown}", flush=True)


if __name__ == "__main__":
  main()
