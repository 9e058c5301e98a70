"""Errors that the command line shows as one line, without a traceback."""


class ExperimentError(Exception):
  """What a run cannot go on from, in words for the one who started it."""


class UsageError(ExperimentError):
  """A value on the command line that makes no sense; the command ends with status 2."""


class DataError(ExperimentError):
  """A data file that is missing, or is not what it should be."""
