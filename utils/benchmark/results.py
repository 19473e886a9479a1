"""What a measurement results in: a row of numbers by name, a line of text, a table."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from utils.benchmark.roofline import COMPONENTS
from utils.runtime.device import is_out_of_memory
from utils.runtime.formatting import TableRows, format_table

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
        ("GB", "peak_memory_gb", ".1f"),
        ("", "error", ""),
    ],
    "components": [
        ("phase", "name", ""), ("batch", "batch", ""),
        *(
            column
            for part in COMPONENTS
            for column in (
                (f"{part} ms", f"{part}_ms", ".2f"), ("limit", f"{part}_limit_ms", ".2f"),
                ("share", f"{part}_share", ".0%"),
            )
        ),
        ("", "error", ""),
    ],
    "transitions": [
        ("transition", "name", ""), ("bare s", "bare_s", ".3f"),
        ("GB", "peak_memory_gb", ".1f"), ("checked s", "checked_s", ".3f"),
        ("GB", "checked_peak_memory_gb", ".1f"), ("copy s", "copy_s", ".4f"),
        ("copied GB", "made_gb", ".2f"), ("", "error", ""),
    ],
    "tokenize": [
        ("tokenize", "file", ""), ("MB", "mb", ",.1f"), ("MB/s", "mb_per_s", ".2f"),
        ("tokens", "tokens", ",d"), ("open s", "open_s", ".3f"),
    ],
    "startup": [("startup", "preset", ""), ("first step s", "first_step_s", ".2f")],
}  # fmt: skip
"""For each kind of measurement the columns of its table: heading, name in the row, format."""


def format_results(rows: dict[str, list[ResultRow]]) -> str:
    """Returns a table for each kind of measurement, without the columns that are empty."""
    tables = []
    for kind in filter(rows.get, TABLES):
        columns = [c for c in TABLES[kind] if any(row.get(c[1]) is not None for row in rows[kind])]
        cells: TableRows = [tuple(title for title, _, _ in columns)]
        for row in rows[kind]:
            values = [(row.get(name), form) for _, name, form in columns]
            cells.append(tuple("-" if v is None else format(v, form) for v, form in values))
        tables.append("\n".join(format_table(cells)))
    return "\n\n".join(tables)


@contextmanager
def catch_out_of_memory(row: ResultRow) -> Iterator[None]:
    """Adds an error to `row`, in place of what was to be measured within, if memory runs out."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        row["error"] = "out of memory"
