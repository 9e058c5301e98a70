"""Tables in plain text."""

from collections.abc import Sequence


def plain_table(lines: Sequence[Sequence[str]]) -> str:
  """A table under its first line: its first column to the left, its numbers to the right.

  >>> print(plain_table([("layer", "kappa"), ("conv", "3.1"), ("dense1", "12")]))
  layer   kappa
  -------------
  conv      3.1
  dense1     12

  Args:
    lines: rows of one length, the headings first. A last column without a heading holds notes, and
      stands to the left.
  """
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  left = {0} if lines[0][-1] else {0, len(widths) - 1}
  table = [
    "  ".join(
      x.ljust(w) if i in left else x.rjust(w)
      for i, (x, w) in enumerate(zip(x, widths, strict=True))
    ).rstrip()
    for x in lines
  ]
  return "\n".join([table[0], "-" * max(map(len, table)), *table[1:]])
