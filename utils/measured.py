"""What the benchmark has found so far: a line as it comes, tables at the end, and a JSON file."""

import json
from pathlib import Path

from utils.files import whole_file
from utils.header import Rows, table
from utils.timing import PARTS

Row = dict[str, object]

TABLES = {
    "rates": [("FLOP/s", "flops_per_s", ".3g"), ("bytes/s", "bytes_per_s", ".3g")],
    "steps": [
        ("phase", "name", ""), ("model", "model", ""), ("batch", "batch", ""),
        ("ms", "ms", ".2f"), ("min", "ms_min", ".2f"), ("max", "ms_max", ".2f"),
        ("without data", "ms_without_data", ".2f"),
        ("tokens/s", "tokens_per_s", ",.0f"),
        ("limit", "limit_tokens_per_s", ",.0f"), ("of it", "of_limit", ".1%"),
        ("MFU", "mfu", ".3f"), ("GB", "peak_memory_gb", ".1f"),
        ("", "error", ""),
    ],
    "parts": [
        ("phase", "name", ""), ("batch", "batch", ""),
        *(
            column
            for part in PARTS
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
    "tokenise": [
        ("tokenise", "file", ""), ("MB", "mb", ",.1f"), ("MB/s", "mb_per_s", ".2f"),
        ("tokens", "tokens", ",d"), ("open s", "open_s", ".3f"),
    ],
    "startup": [("startup", "preset", ""), ("first step s", "first_step_s", ".2f")],
}  # fmt: skip
"""By kind of measurement: the heading of each column, what it shows, and in what format."""


class Measured:
    """Rows by kind. The file is whole after each of them, should a later one never come."""

    def __init__(self, path: Path | None, **about: object):
        self.path, self.about = path, about
        self.rows: dict[str, list[Row]] = {}
        self.save()

    def add(self, kind: str, row: Row) -> None:
        self.rows.setdefault(kind, []).append(row)
        facts = [f"{name} {shown(value)}" for name, value in row.items() if value is not None]
        print(f"{kind}: {', '.join(facts)}", flush=True)
        self.save()

    def save(self) -> None:
        if self.path is not None:
            text = json.dumps(self.about | self.rows, indent=1, allow_nan=False, default=str)
            with whole_file(self.path) as file:
                file.write(f"{text}\n".encode())

    def __str__(self) -> str:
        return "\n\n".join(
            "\n".join(table(cells(columns, self.rows[kind])))
            for kind, columns in TABLES.items()
            if kind in self.rows
        )


def shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def cells(columns: list[tuple[str, str, str]], rows: list[Row]) -> Rows:
    """Without the columns that no row has anything for."""
    used = [column for column in columns if any(row.get(column[1]) is not None for row in rows)]
    body = [tuple(cell(row.get(key), how) for _, key, how in used) for row in rows]
    return [tuple(title for title, _, _ in used), *body]


def cell(value: object, how: str) -> str:
    return "-" if value is None else format(value, how)
