"""Tables in plain text."""

from collections.abc import Collection, Sequence


def plain_table(lines: Sequence[Sequence[str]], right: Collection[str]) -> str:
  """A table under its first line.

  >>> print(plain_table([("layer", "kappa"), ("conv", "3.1"), ("dense1", "12")], right={"kappa"}))
  layer   kappa
  -------------
  conv      3.1
  dense1     12

  Args:
    lines: rows of one length, the headings first.
    right: the headings of the columns that stand to the right, as numbers do.
  """
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  align = [str.rjust if heading in right else str.ljust for heading in lines[0]]
  table = [
    "  ".join(a(x, w) for a, x, w in zip(align, line, widths, strict=True)).rstrip()
    for line in lines
  ]
  return "\n".join([table[0], "-" * max(map(len, table)), *table[1:]])
