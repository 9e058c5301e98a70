"""Tests of the command line, from the command to the picture, and of killed runs."""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time

import bnp_experiments
from bnp_experiments import data, protocol, session, training
from bnp_experiments.__main__ import main
from bnp_experiments.checkpoints import Checkpoints
from bnp_experiments.results import FILE, open_results
import pytest

SMALL = ["--batch-sizes", "200", "--methods", "sgd", "bnp", "--seeds", "2"]


@pytest.fixture
def call(monkeypatch, tmp_path):
  """Call the command line as a shell would, in a separate folder."""
  monkeypatch.chdir(tmp_path)

  def run(*arguments):
    monkeypatch.setattr(sys, "argv", ["bnp-optax", *map(str, arguments)])
    try:
      return main()
    except SystemExit as stop:
      return stop.code

  return run


@pytest.fixture
def small_experiment(monkeypatch):
  """Save checkpoints after every epoch, as for long epochs, and take few times."""
  monkeypatch.setattr(session, "Checkpoints", functools.partial(Checkpoints, seconds_apart=0))
  monkeypatch.setattr(
    protocol.timing,
    "step_times",
    lambda setups, *images: {setup: [1.0, 2.0, 3.0] for setup in setups},
  )


def _records(folder, kind):
  lines = [json.loads(line) for line in (folder / FILE).read_text().splitlines()]
  return [line for line in lines if line["kind"] == kind]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["nothing"], "'nothing': choose from quickstart, optimizers"),
    (["quickstart", "--dataset", "svhn"], "'svhn': choose from mnist1d, digits, mnist"),
    (["quickstart", "--methods", "sgd", "sdg"], "'sdg': choose from sgd, batchnorm"),
    (["quickstart", "--epochs", "0"], "--epochs must be at least 1, found 0"),
    (["quickstart", "--seeds", "-1"], "--seeds must be at least 1, found -1"),
    (["quickstart", "--batch-sizes", "6", "0"], "--batch-sizes must be at least 1, found 0"),
    (["quickstart", "--batch-sizes", "5000"], "5000 is more than the 3600 images of mnist1d"),
    (["quickstart", "--out", "/dev/null/folder"], "--out /dev/null/folder"),
    (["quickstart", "--epochs", "abc"], "argument --epochs: invalid int value: 'abc'"),
    (["quickstart", "--methods"], "argument --methods: expected at least one argument"),
    (["quickstart", "--nothing"], "unrecognized arguments: --nothing"),
    (["quickstart", "--scale", "big"], "invalid choice: 'big'"),
    ([], "the following arguments are required: EXPERIMENT"),
  ],
)
def test_bad_values_get_one_line_and_status_2(call, capsys, arguments, message):
  assert call("run", *arguments) == 2
  captured = capsys.readouterr()
  assert message in captured.err
  assert captured.err.startswith("bnp-optax: ")
  assert captured.err.count("\n") == 1
  assert captured.out == ""


def test_missing_data_is_one_line(call, capsys, tmp_path, monkeypatch):
  (tmp_path / "file").touch()
  monkeypatch.setenv("BNP_OPTAX_DATA", str(tmp_path / "file"))
  assert call("run", "quickstart", "--dataset", "cifar10") == 1
  assert "data_batch_1.bin is missing" in capsys.readouterr().err


def test_version(call, capsys):
  assert call("--version") == 0
  assert capsys.readouterr().out == f"bnp-optax {bnp_experiments.__version__}\n"


def test_help_names_all_data_sets(call, capsys):
  assert call("run", "--help") == 0
  assert ", ".join(data.NAMES) in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_a_closed_pipe_ends_the_command_without_a_traceback():
  command = [sys.executable, "-m", "bnp_experiments", "list"]
  environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
  reader, writer = os.pipe()
  os.close(reader)
  done = subprocess.run(
    command, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
  )
  os.close(writer)
  assert done.returncode == 141
  assert done.stderr == ""


def test_list_names_the_experiments(call, capsys):
  assert call("list") == 0
  names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
  assert names[:3] == ["quickstart", "optimizers", "fig3-left"]


def test_quickstart_from_command_to_picture(call, capsys, tmp_path):
  arguments = ["run", "quickstart", *SMALL, "--epochs", "2"]
  assert call(*arguments) == 0
  folder = tmp_path / "bnp_optax_results" / "quickstart-mnist1d-laptop"
  output = capsys.readouterr().out
  assert f"picture: {folder.relative_to(tmp_path)}/quickstart.png" in output
  assert "BNP" in output
  assert (folder / "quickstart.png").read_bytes().startswith(b"\x89PNG")
  assert (folder / "quickstart.md").read_text().count("| BNP |") == 1
  epochs = _records(folder, "epoch")
  assert [(epoch["method"], epoch["epoch"]) for epoch in epochs] == [
    *[("sgd", 1), ("sgd", 2), ("bnp", 1), ("bnp", 2)]
  ]
  assert epochs[0]["seeds"] == [1, 2]
  assert len(epochs[0]["test_accuracy"]) == 2
  assert {epoch["dataset"] for epoch in epochs} == {"mnist1d"}
  chosen = _records(folder, "rate")
  assert len(chosen[0]["validation_accuracy"]) == len(chosen[0]["rates"])
  (times,) = _records(folder, "step_time")
  assert set(times["relative_to_sgd"]) == {"sgd", "bnp"}

  before = (folder / FILE).read_bytes()
  (folder / "quickstart.png").unlink()
  assert call(*arguments) == 0
  assert (folder / FILE).read_bytes() == before
  assert (folder / "quickstart.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stops", [(2,), pytest.param((17, 35), marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_to_the_same_bits(
  call, capsys, tmp_path, monkeypatch, small_experiment, stops
):
  arguments = ["run", "quickstart", *SMALL, "--epochs", "3", "--out"]
  assert call(*arguments, "undisturbed") == 0
  calls = []
  train_epoch = training.train_epoch

  def stopping(*args, **kwargs):
    calls.append(None)
    if len(calls) in stops:
      raise KeyboardInterrupt
    return train_epoch(*args, **kwargs)

  with monkeypatch.context() as patch:
    patch.setattr(training, "train_epoch", stopping)
    for _ in stops:
      assert call(*arguments, "stopped") == 130
      assert capsys.readouterr().err.count("\n") == 1
  bars = []
  progress = session._progress
  monkeypatch.setattr(
    session, "_progress", lambda console: bars.append(progress(console)) or bars[-1]
  )
  assert call(*arguments, "stopped") == 0
  (task,) = bars[0].tasks
  assert task.completed == task.total > 0
  for kind in ("rate", "epoch"):
    undisturbed = _records(tmp_path / "undisturbed", kind)
    assert _records(tmp_path / "stopped", kind) == undisturbed
    assert len(undisturbed) == {"rate": 2, "epoch": 6}[kind]


@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_results_that_were_cut_short_are_made_again(call, tmp_path, small_experiment, cut):
  arguments = ["run", "quickstart", *SMALL, "--epochs", "3", "--out", "out"]
  assert call(*arguments) == 0
  whole = (tmp_path / "out" / FILE).read_text().splitlines(keepends=True)
  (tmp_path / "out" / FILE).write_text("".join(whole[: -cut - 1]) + whole[-cut - 1][:-20])
  assert call(*arguments) == 0
  records = (tmp_path / "out" / FILE).read_text().splitlines(keepends=True)
  assert [line for line in records if '"kind": "run"' not in line] == whole[1:]


@pytest.mark.slow
def test_more_epochs_go_on_from_where_fewer_ended(call, tmp_path, small_experiment):
  arguments = ["run", "quickstart", *SMALL, "--epochs"]
  assert call(*arguments, 2, "--out", "short") == 0
  assert call(*arguments, 3, "--out", "short") == 0
  assert call(*arguments, 3, "--out", "long") == 0
  short, long = (_records(tmp_path / name, "epoch") for name in ("short", "long"))
  assert all(record in short for record in long)


@pytest.mark.slow
def test_a_folder_in_use_is_refused(call, capsys, tmp_path):
  with open_results(tmp_path / "out", []):
    assert call("run", "quickstart", "--out", "out") == 2
  assert "another run is writing" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_outright_the_folder_is_free_again(tmp_path):
  command = [sys.executable, "-m", "bnp_experiments", "run", "quickstart", "--out", "out"]
  environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
  with subprocess.Popen(
    [*command, *SMALL], cwd=tmp_path, env=environment, stderr=subprocess.PIPE
  ) as process:
    while not (tmp_path / "out" / FILE).exists():
      assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
  with open_results(tmp_path / "out", []):
    pass


@pytest.mark.slow
def test_killed_at_ten_random_moments_it_goes_on_to_the_same_bits(tmp_path):
  program = (
    "import functools, sys\n"
    "from bnp_experiments import session\n"
    "from bnp_experiments.__main__ import main\n"
    "session.Checkpoints = functools.partial(session.Checkpoints, seconds_apart=0)\n"
    "sys.exit(main())\n"
  )
  command = [sys.executable, "-c", program, "run", "quickstart", "--dataset", "digits"]
  command += ["--batch-sizes", "6", "--methods", "sgd", "bnp", "--epochs", "6", "--out"]
  environment = os.environ | {
    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    # Twelve processes compile the same programs.
    "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }

  def start(out):
    return subprocess.Popen(
      [*command, out],
      cwd=tmp_path,
      env=environment,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )

  def size():
    path = tmp_path / "killed" / FILE
    return path.stat().st_size if path.exists() else 0

  assert start("undisturbed").wait() == 0
  rng = random.Random(0)
  for _ in range(10):
    process, before = start("killed"), size()
    # Once it has done something new, at any moment.
    while size() == before and process.poll() is None:
      time.sleep(0.01)
    time.sleep(rng.expovariate(2))
    process.kill()
    process.wait()
  assert start("killed").wait() == 0
  for kind in ("trial", "rate", "epoch"):
    undisturbed = _records(tmp_path / "undisturbed", kind)
    assert undisturbed
    assert _records(tmp_path / "killed", kind) == undisturbed
