"""BNP in trainers that own the training step.

The trainers are not edited. They get a `Tapped` model, and BNP as the optimizer. A trainer has one
learning rate for both optimizers, in `TRAINERS`, written down before the runs.

  pip install sbx-rl numpyro transformers==4.52.4 datasets ml_collections
  git clone --depth 1 --branch v4.52.4 https://github.com/huggingface/transformers
  git clone --depth 1 --branch v0.8.3 https://github.com/google/flax
  python benchmarks/trainers.py run svi dqn ppo sac gpt2 mnist --seeds 5
  python benchmarks/trainers.py report

`run` appends one record per seed to benchmarks/records/trainers.jsonl and leaves out what has one.
Only gpt2 and mnist need the clones and `bnp_experiments`.
Quoted by: docs/howto/trainers.md, "Results".
"""

import argparse
from collections.abc import Callable
import contextlib
import importlib.metadata
import json
import os
import pathlib
import runpy
import statistics
import sys
import tempfile
from typing import Any, NamedTuple
from unittest import mock
import warnings

import flax.linen as nn
from flax.training import train_state
import jax
import jax.numpy as jnp
import optax
from tables import append, head, read, row

import bnp_optax

RECORDS = pathlib.Path(__file__).parent / "records" / "trainers.jsonl"


def adam(learning_rate: float) -> optax.GradientTransformation:
  """Return Adam, with the signature of `bnp_adam`."""
  return optax.adam(learning_rate)


def bnp_adam(learning_rate: float) -> optax.GradientTransformationExtraArgs:
  """Return Adam in BNP's coordinates."""
  return bnp_optax.bnp(optax.adam(learning_rate))


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


def ppo(learning_rate: float, bnp: bool, seed: int) -> float:
  """Return the mean return of PPO on CartPole after 10,240 steps."""
  import sbx
  from sbx.ppo.policies import Actor, Critic

  policy = {"optimizer_class": bnp_adam if bnp else adam}
  if bnp:
    policy |= {"actor_class": tapped(Actor, 64), "critic_class": tapped(Critic, 64)}
  return train(
    sbx.PPO("MlpPolicy", "CartPole-v1", learning_rate, policy_kwargs=policy, seed=seed), 10_240
  )


def dqn(learning_rate: float, bnp: bool, seed: int) -> float:
  """Return the mean return of DQN on CartPole after 10,000 steps."""
  import sbx
  from sbx.dqn import policies

  network = policies.QNetwork
  if bnp:
    policies.QNetwork = tapped(network, 64)
  try:
    model = sbx.DQN(
      *("MlpPolicy", "CartPole-v1", learning_rate),
      batch_size=64,
      learning_starts=1000,
      target_update_interval=200,
      exploration_fraction=0.2,
      exploration_final_eps=0.04,
      policy_kwargs={"optimizer_class": bnp_adam if bnp else adam, "net_arch": [64]},
      seed=seed,
    )
  finally:
    policies.QNetwork = network
  return train(model, 10_000)


def sac(learning_rate: float, bnp: bool, seed: int) -> float:
  """Return the mean return of SAC on Pendulum after 3,000 steps."""
  import sbx
  from sbx.sac.policies import SquashedGaussianActor, VectorCritic

  policy = {"optimizer_class": bnp_adam if bnp else adam, "net_arch": [64, 64]}
  if bnp:
    policy["optimizer_class"] = lambda learning_rate: bnp_optax.bnp(
      optax.adam(learning_rate), layers=SAC_LAYERS
    )
    policy["actor_class"] = tapped(SquashedGaussianActor, 256)
    policy["vector_critic_class"] = tapped(VectorCritic, 256)
  model = sbx.SAC("MlpPolicy", "Pendulum-v1", learning_rate, policy_kwargs=policy, seed=seed)
  return train(model, 3_000)


class Net(nn.Module):
  """A regression network."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Return a prediction for each example."""
    for _ in range(2):
      x = nn.tanh(nn.Dense(50)(x))
    return nn.Dense(1)(x)[:, 0]


def svi(learning_rate: float, bnp: bool, seed: int) -> float:
  """Return the negative ELBO of a regression after 1,000 steps of SVI, per example."""
  import numpyro
  from numpyro.contrib.module import flax_module

  network = tapped(Net, 256)() if bnp else Net()
  x = 3 + jax.random.normal(jax.random.key(0), (256, 4))
  y = jnp.sin(3 * x[:, 0]) * x[:, 1] + x[:, 2]

  def model(x: jax.Array, y: jax.Array) -> None:
    net = flax_module("net", network, x)
    noise = numpyro.sample("noise", numpyro.distributions.LogNormal(-1.0, 1.0))
    numpyro.sample("y", numpyro.distributions.Normal(net(x), noise), obs=y)

  guide = numpyro.infer.autoguide.AutoNormal(model)
  tx = numpyro.optim.optax_to_numpyro((bnp_adam if bnp else adam)(learning_rate))
  inference = numpyro.infer.SVI(model, guide, tx, numpyro.infer.Trace_ELBO())
  losses = inference.run(jax.random.key(seed), 1_000, x, y, progress_bar=False).losses
  return float(jnp.mean(losses[-100:])) / len(x)


def gpt2(learning_rate: float, bnp: bool, seed: int) -> float:
  """Return the loss on held-out text of a small FlaxGPT2 after an epoch of run_clm_flax.py."""
  os.environ["HF_HUB_OFFLINE"] = "1"
  from bnp_experiments import data
  import transformers
  from transformers.models.gpt2 import modeling_flax_gpt2, tokenization_gpt2

  class TappedGPT2(modeling_flax_gpt2.FlaxGPT2LMHeadModel):
    def module_class(self, **kwargs: Any) -> Any:
      module = modeling_flax_gpt2.FlaxGPT2LMHeadModule(**kwargs)
      return bnp_optax.linen.Tapped(module, examples=16 * 64, example_axes=2)

  def make_model(config: Any, *, seed: int, dtype: Any, **_: Any) -> Any:
    return TappedGPT2(config, seed=seed, dtype=dtype)

  adamw = optax.adamw

  def bnp_adamw(*args: Any, **kwargs: Any) -> Any:
    module = modeling_flax_gpt2.FlaxGPT2LMHeadModule(config)
    layers = bnp_optax.linen.layers(module, *[jnp.ones((1, 2), int)] * 3)
    return bnp_optax.bnp(adamw(*args, **kwargs), layers=layers)

  folder = pathlib.Path(tempfile.mkdtemp())
  text = data.load("pydoc")
  for name, characters in (("train", text.x_train), ("validation", text.x_test)):
    (folder / f"{name}.txt").write_bytes(characters.tobytes())
  # A token is a byte.
  tokens = [*tokenization_gpt2.bytes_to_unicode().values(), "<|endoftext|>"]
  (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
  (folder / "merges.txt").write_text("#version: 0.2\n")
  tokenizer = transformers.GPT2TokenizerFast(
    str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=64
  )
  tokenizer.save_pretrained(folder)
  config = transformers.GPT2Config(len(tokens), n_positions=64, n_embd=64, n_layer=2, n_head=4)
  config.save_pretrained(folder)

  argv = (
    f"run_clm_flax.py --train_file={folder}/train.txt --validation_file={folder}/validation.txt "
    f"--config_name={folder} --tokenizer_name={folder} --cache_dir={folder}"
    f" --output_dir={folder}/out --do_train --do_eval --block_size=64 --num_train_epochs=1 "
    f"--per_device_train_batch_size=16 --learning_rate={learning_rate} --seed={seed} "
    "--eval_steps=10000 --save_steps=10000"
  ).split()
  (folder / "out").mkdir()
  with contextlib.ExitStack() as stack:
    stack.enter_context(mock.patch.object(sys, "argv", argv))
    if bnp:
      bnp_optax.linen.register(modeling_flax_gpt2.FlaxConv1D, "...d,fd->...f")
      auto = transformers.FlaxAutoModelForCausalLM
      stack.enter_context(mock.patch.object(auto, "from_config", make_model))
      stack.enter_context(mock.patch.object(optax, "adamw", bnp_adamw))
    runpy.run_path("transformers/examples/flax/language-modeling/run_clm_flax.py", None, "__main__")
  return json.loads((folder / "out" / "eval_results.json").read_text())["eval_loss"]


def mnist(learning_rate: float, bnp: bool, seed: int) -> float:
  """Return the test accuracy in % of Flax's MNIST example after an epoch."""
  from bnp_experiments import data
  import ml_collections

  tensorboard = mock.MagicMock()
  absent = {"tensorflow_datasets": mock.MagicMock(), "flax.metrics.tensorboard": tensorboard}
  with mock.patch.dict(sys.modules, absent):
    example = runpy.run_path("flax/examples/mnist/train.py")

  def get_datasets() -> list[dict[str, Any]]:
    images = data.load("mnist")
    pairs = (images.x_train, images.y_train), (images.x_test, images.y_test)
    return [{"image": jnp.float32(x)[..., None] / 255, "label": jnp.int32(y)} for x, y in pairs]

  def create_train_state(rng: jax.Array, config: Any) -> train_state.TrainState:
    model = tapped(example["CNN"], config.batch_size)() if bnp else example["CNN"]()
    params = model.init(jax.random.fold_in(rng, seed), jnp.ones([1, 28, 28, 1]))["params"]
    tx = optax.sgd(config.learning_rate, config.momentum)
    tx = bnp_optax.bnp(tx) if bnp else tx
    return train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx)

  train_and_evaluate = example["train_and_evaluate"]
  replaced = {"get_datasets": get_datasets, "create_train_state": create_train_state}
  train_and_evaluate.__globals__.update(replaced)
  config = {"learning_rate": learning_rate, "momentum": 0.9, "batch_size": 128, "num_epochs": 1}
  train_and_evaluate(ml_collections.ConfigDict(config), "")
  scalars = tensorboard.SummaryWriter.return_value.scalar.call_args_list
  return 100 * float({call.args[0]: call.args[1] for call in scalars}["test_accuracy"])


class Trainer(NamedTuple):
  """A trainer and its problem.

  Attributes:
    train: Returns the result of a run, given the learning rate, whether to use BNP, and the seed.
    learning_rate: The learning rate of both optimizers.
    problem: What is trained, and for how long.
    result: What the result is, and whether more is better.
    optimizer: The name of the optimizer.
    digits: Number of decimals of the result to show.
    packages: The distributions that the trainer comes from.
  """

  train: Callable[[float, bool, int], float]
  learning_rate: float
  problem: str
  result: str
  optimizer: str
  digits: int
  packages: tuple[str, ...]


SBX = ("sbx-rl", "gymnasium")
RETURN = "return, more is better"
TRAINERS = {
  "svi": Trainer(
    *(svi, 3e-3, "numpyro SVI, regression, 1,000 steps"),
    *("negative ELBO per example, less is better", "Adam", 2, ("numpyro",)),
  ),
  "dqn": Trainer(dqn, 1e-3, "sbx DQN, CartPole, 10,000 steps", RETURN, "Adam", 0, SBX),
  "ppo": Trainer(ppo, 3e-4, "sbx PPO, CartPole, 10,240 steps", RETURN, "Adam", 0, SBX),
  "sac": Trainer(sac, 1e-3, "sbx SAC, Pendulum, 3,000 steps", RETURN, "Adam", 0, SBX),
  "gpt2": Trainer(
    *(gpt2, 1e-3, "run_clm_flax.py, FlaxGPT2 of 2 layers, 1 epoch of 16 x 64 characters"),
    *("loss on held-out text, less is better", "AdamW", 3, ("transformers", "datasets")),
  ),
  "mnist": Trainer(
    *(mnist, 0.1, "Flax's MNIST example, CNN, 1 epoch at its rate"),
    *("test accuracy in %, more is better", "momentum", 2, ()),
  ),
}


def run(records: pathlib.Path, names: list[str], seeds: int) -> None:
  """Train what has no record yet, and append the records."""
  warnings.simplefilter("ignore")
  # Every run traces its step again; the programs of all seeds are the same.
  jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp())
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  for name in names:
    train, learning_rate, *_, packages = TRAINERS[name]
    versions = {x: importlib.metadata.version(x) for x in ("jax", "flax", "optax", *packages)}
    for seed in range(seeds):
      for bnp in (False, True):
        key = {"trainer": name, "learning_rate": learning_rate, "bnp": bnp, "seed": seed}
        if any(key.items() <= record.items() for record in read(records)):
          continue
        record = {**key, "result": float(train(learning_rate, bnp, seed)), "versions": versions}
        append(records, record)
        print(json.dumps(record), flush=True)


def report(records: pathlib.Path) -> None:
  """Print the table of the page: the mean over the seeds, and each of them."""
  found = read(records)
  print(head(("trainer", "result", "optimizer", "rate", "alone", "with BNP"), "llllll"))
  for name, trainer in TRAINERS.items():
    cells = [trainer.problem, trainer.result, trainer.optimizer, f"{trainer.learning_rate:g}"]
    for bnp in (False, True):
      key = {"trainer": name, "learning_rate": trainer.learning_rate, "bnp": bnp}
      results = sorted((r["seed"], r["result"]) for r in found if key.items() <= r.items())
      numbers = [result for _, result in results]
      mean, *each = (f"{x:.{trainer.digits}f}" for x in (statistics.mean(numbers), *numbers))
      cells.append(f"{mean} ({', '.join(each)})")
    print(row(cells))


def main() -> None:
  """Read the command line."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("command", choices=("run", "report"))
  parser.add_argument("trainers", nargs="*", help=f"of {', '.join(TRAINERS)}")
  parser.add_argument("--seeds", type=int, default=5)
  options = parser.parse_args()
  if options.command == "run":
    run(RECORDS, options.trainers, options.seeds)
  else:
    report(RECORDS)


if __name__ == "__main__":
  main()
