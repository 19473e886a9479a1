"""Numbers have a unit that fits them, and tables and lines fit 80 columns and lose nothing."""

import pytest

from utils.runtime.formatting import (
    LINE_WIDTH,
    format_duration,
    format_gb,
    format_number,
    format_table,
    join_parts,
    wrap_lines,
)


@pytest.mark.parametrize(
    "size, text",
    [
        (29.84, "29.8 GB"),
        (0.1, "0.1 GB"),
        (0.0451, "45.1 MB"),
        (2e-5, "20.0 kB"),
        (3e-8, "30 bytes"),
    ],
)
def test_a_size_is_in_the_unit_that_shows_it(size, text):
    assert format_gb(size) == text


@pytest.mark.parametrize("exponent", range(-9, 5))
def test_no_size_above_zero_is_shown_as_zero(exponent):
    assert not format_gb(10.0**exponent).startswith("0.0")
    assert format_duration(10.0**exponent).split()[0] != "0"


@pytest.mark.parametrize("number, text", [(999.6, "1 k"), (999_950, "1 M"), (64.3e6, "64.3 M")])
def test_a_number_that_is_rounded_up_to_the_next_unit_is_shown_in_it(number, text):
    assert format_number(number) == text


@pytest.mark.parametrize("num_keys", [1, 3])
@pytest.mark.parametrize("columns", [1, 4, 25])
def test_a_table_fits_a_line_and_shows_every_cell_beside_its_row(columns, num_keys):
    head = tuple(f"column {i}" for i in range(num_keys + columns))
    rows = [head, *(tuple(f"{r}.{i}" for i in range(len(head))) for r in range(3))]
    lines = format_table(rows, num_keys)
    assert max(map(len, lines)) <= LINE_WIDTH
    for number, row in enumerate(rows[1:]):
        own = [line.split() for line in lines if line.startswith(row[0])]
        assert [cell for cells in own for cell in cells[num_keys:]] == [*row[num_keys:]]
        assert all(cells[:num_keys] == [*row[:num_keys]] for cells in own), number
    blocks = "\n".join(lines).split("\n\n")
    assert all(len(block.splitlines()) == len(rows) for block in blocks)


def test_prose_is_broken_between_words_and_a_path_never():
    path = "/home/" + "a-long-folder/" * 8
    text = wrap_lines(f"short\n  > {'some words ' * 20}{path} --an.option\n")
    assert path in text.split() and text.startswith("short\n  > some words")
    assert all(len(line) <= LINE_WIDTH for line in text.splitlines() if path not in line)
    assert all(line.startswith("    ") for line in text.splitlines()[2:])


def test_parts_of_a_line_are_never_broken():
    parts = [f"part number {i}" for i in range(9)]
    lines = join_parts(parts).split("\n")
    assert [part for line in lines for part in line.strip().split("  ")] == parts
    assert len(lines) == 2 and max(map(len, lines)) <= LINE_WIDTH
