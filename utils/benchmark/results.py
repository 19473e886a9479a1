"""What a measurement results in: a row of numbers by name, a line of text, a table."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from utils.benchmark.roofline import COMPONENTS
from utils.runtime.device import is_out_of_memory
from utils.runtime.formatting import TableRows, format_gb, format_table

ResultRow = dict[str, Any]
"""What was measured, by name; None where it cannot be."""

TABLES = {
    "rates": [
        ("FLOP/s", "flops_per_s", ".3g"), ("nominal", "nominal_flops_per_s", ".3g"),
        ("bytes/s", "bytes_per_s", ".3g"),
    ],
    "steps": [
        ("phase", "name", ""), ("model", "model", ""), ("batch", "batch", ""),
        ("ms", "ms", ".2f"), ("min", "ms_min", ".2f"), ("max", "ms_max", ".2f"),
        ("without data", "ms_without_data", ".2f"),
        ("tokens/s", "tokens_per_s", ",.0f"),
        ("limit", "limit_tokens_per_s", ",.0f"), ("of it", "of_limit", ".1%"),
        ("MFU", "mfu", ".3f"), ("of matrix rate", "of_matrix_rate", ".3f"),
        ("memory", "peak_memory_gb", format_gb),
        ("", "error", ""),
    ],
    "components": [
        ("phase", "name", ""), ("batch", "batch", ""),
        *(
            column
            for part in COMPONENTS
            for column in (
                (f"{part} ms", f"{part}_ms", ".2f"),
                (f"{part} limit", f"{part}_limit_ms", ".2f"),
                (f"{part} share", f"{part}_share", ".0%"),
            )
        ),
        ("", "error", ""),
    ],
    "transitions": [
        ("transition", "name", ""), ("bare s", "bare_s", ".3f"),
        ("bare memory", "peak_memory_gb", format_gb), ("checked s", "checked_s", ".3f"),
        ("checked memory", "checked_peak_memory_gb", format_gb), ("copy s", "copy_s", ".4f"),
        ("copied", "made_gb", format_gb), ("", "error", ""),
    ],
    "tokenize": [
        ("tokenize", "file", ""), ("MB", "mb", ",.1f"), ("MB/s", "mb_per_s", ".2f"),
        ("tokens", "tokens", ",d"), ("open s", "open_s", ".3f"),
    ],
    "startup": [("startup", "preset", ""), ("first step s", "first_step_s", ".2f")],
}  # fmt: skip
"""For each kind of measurement the columns of its table: heading, name in the row, and a format or
a function that makes a text."""
KEY_COLUMNS = {"phase", "model", "batch"}
"""Headings of the columns that say which row it is. They come first."""


def format_results(rows: dict[str, list[ResultRow]]) -> str:
    """Returns a table for each kind of measurement, without the columns that are empty."""
    tables = []
    for kind in filter(rows.get, TABLES):
        columns = [c for c in TABLES[kind] if any(row.get(c[1]) is not None for row in rows[kind])]
        cells: TableRows = [tuple(title for title, _, _ in columns)]
        for row in rows[kind]:
            cells.append(tuple(format_cell(row.get(name), form) for _, name, form in columns))
        num_keys = sum(title in KEY_COLUMNS for title in cells[0])
        tables.append("\n".join(format_table(cells, num_keys or 1)))
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
