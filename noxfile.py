"""Run the tests with the oldest and newest supported versions: `nox -s oldest newest`."""

import nox

nox.options.sessions = ["newest"]

OLDEST = ["jax==0.8.1", "jaxlib==0.8.1", "flax==0.12.6", "optax==0.2.7", "chex==0.1.91"]


@nox.session(python="3.11")
def oldest(session):
  session.install("-e", ".[test]", "-e", "./experiments", *OLDEST)
  session.run("pytest", "-n", "auto", *session.posargs)


@nox.session(python=["3.11", "3.12", "3.13"])
def newest(session):
  session.install("--upgrade", "--upgrade-strategy=eager", "-e", ".[test]", "-e", "./experiments")
  session.run("pytest", "-n", "auto", *session.posargs)
