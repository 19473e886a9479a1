"""What a measurement results in: a row of numbers by name, and a row of a table."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from utils.benchmark.roofline import COMPONENTS
from utils.runtime.device import is_out_of_memory
from utils.runtime.formatting import TableRows, format_gb, format_table

ResultRow = dict[str, Any]
"""What was measured, by name; None where it cannot be."""


class Measurement(NamedTuple):
    """Something to measure."""

    name: str
    measure: Callable[[], Iterator[tuple[str, ResultRow]]]
    """Yields the results, each with its kind."""
    expected_s: float = 0.0
    """About how long it takes, where that can be known."""


TABLES = {
    "rates": [
        ("FLOP/s", "flops_per_s", ".3g"), ("nominal", "nominal_flops_per_s", ".3g"),
        ("bytes/s", "bytes_per_s", ".3g"),
    ],
    "steps": [
        ("phase", "name", ".16"), ("model", "model", ""), ("batch", "batch", ""),
        ("ms", "ms", ".2f"), ("tokens/s", "tokens_per_s", ",.0f"), ("limit", "of_limit", ".0%"),
        ("memory", "peak_memory_gb", format_gb), ("MFU", "mfu", ".0%"),
        ("min", "ms_min", ".2f"), ("max", "ms_max", ".2f"),
        ("without data", "ms_without_data", ".2f"),
    ],
    "components": [
        ("phase", "name", ".16"), ("batch", "batch", ""),
        *(
            column
            for part in COMPONENTS
            for column in ((part, f"{part}_ms", ".2f"), ("", f"{part}_share", ".0%"))
        ),
    ],
    "transitions": [
        ("growth", "name", ".24"), ("bare s", "bare_s", ".3f"),
        ("memory", "peak_memory_gb", format_gb), ("checked s", "checked_s", ".3f"),
        ("memory", "checked_peak_memory_gb", format_gb), ("copy s", "copy_s", ".4f"),
        ("copied", "made_gb", format_gb),
    ],
    "tokenize": [
        ("file", "file", ".32"), ("MB", "mb", ",.1f"), ("MB/s", "mb_per_s", ".2f"),
        ("tokens", "tokens", ",d"), ("open s", "open_s", ".3f"),
    ],
    "startup": [("preset", "preset", ""), ("first step s", "first_step_s", ".2f")],
}  # fmt: skip
"""For each kind of measurement the columns of its table, those that are needed most first: heading,
name in the row, and a format or a function that makes a text."""
KEY_COLUMNS = {"phase", "model", "batch"}
"""Headings of the columns that say which row it is. They come first."""
CAPTIONS = {
    "rates": "What the machine does at best: large matrix products, a large copy",
    "steps": "Training step: its median; limit is its share of the speed at those rates",
    "components": "Parts of the step, each timed alone: ms, and share of the step",
    "transitions": "Growth: alone, with its checks, and a mere copy of what it makes",
    "tokenize": "Text to tokens on disk, and opening tokens that are there",
    "startup": "From starting train.py to the end of its first step",
}
"""What stands above each table."""


def format_results(rows: dict[str, list[ResultRow]]) -> str:
    """Returns a table for each kind of measurement, without the columns that are empty. An error
    stands in the place of the first number that is missing."""
    tables = []
    for kind in filter(rows.get, TABLES):
        columns = [c for c in TABLES[kind] if any(row.get(c[1]) is not None for row in rows[kind])]
        errors = [row for row in rows[kind] if "error" in row]
        if len(errors) == len(rows[kind]):
            columns.append(("", "error", ""))
        cells: TableRows = [tuple(title for title, _, _ in columns)]
        for row in rows[kind]:
            texts = [format_cell(row.get(name), form) for _, name, form in columns]
            if "error" in row and "-" in texts:
                texts[texts.index("-")] = row["error"]
            cells.append(tuple(texts))
        num_keys = sum(title in KEY_COLUMNS for title in cells[0])
        tables.append("\n".join([CAPTIONS[kind], *format_table(cells, num_keys or 1)]))
    return "\n\n".join(tables)


def format_cell(value: object, form: str | Callable[[Any], str]) -> str:
    """Returns a value as a table shows it, a dash for one that is missing."""
    if value is None:
        return "-"
    return form(value) if callable(form) else format(value, form)


@contextmanager
def catch_out_of_memory(row: ResultRow) -> Iterator[None]:
    """Adds an error to `row`, in place of what was to be measured within, if memory runs out."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        row["error"] = "out of memory"
