"""Text becomes one cell of a table, whatever stands in it."""

from formwright.kit.markdown import cell, table


def test_a_cell_is_one_line_without_bars() -> None:
    assert cell("a | b\n  ``c``") == "a \\| b `c`"
    assert table(["x", "y"], [["1", cell(2)]]) == "| x | y |\n| --- | --- |\n| 1 | 2 |"
