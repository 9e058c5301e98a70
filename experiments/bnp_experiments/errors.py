"""Errors that the command line shows as one line, without a traceback."""


class ExperimentError(Exception):
  """An error that ends a run, with a message for its user."""


class UsageError(ExperimentError):
  """An invalid value on the command line; the command ends with status 2."""


class DataError(ExperimentError):
  """A data file that is missing or invalid."""
