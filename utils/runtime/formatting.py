"""Numbers, times, models and tables as people read them."""

import textwrap
from collections.abc import Iterable

from config import ModelConfig

TableRows = list[tuple[str, ...]]
WIDTH, LABEL_WIDTH = 80, 8
"""Characters of a line, and of the label in front of it."""


def format_number(number: float) -> str:
    """Returns three digits and a unit: `64.3 M`."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def format_count(number: float) -> str:
    """Returns how many times something is done, with two digits or more: `0.016`, `3.4`, `120`."""
    return f"{number:,.0f}" if number >= 9.95 else f"{number:.2g}"


def count_noun(number: int, noun: str) -> str:
    """Returns a number of things: `1 file`, `1,204 files`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def wrap_text(text: str, label: str = "") -> list[str]:
    """Returns a text as lines of WIDTH characters, `label` in front of the first. Words that are
    longer, such as paths, stay whole."""
    first, others = f"{label:<{LABEL_WIDTH}}", " " * LABEL_WIDTH
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=others,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def list_some(names: Iterable[object], count: int = 4) -> str:
    """Returns the first few of some names as one phrase, and how many more there are."""
    texts = [str(name) for name in names]
    more = f" and {len(texts) - count} more" if len(texts) > count else ""
    return ", ".join(texts[:count]) + more


def format_duration(seconds: float) -> str:
    """Returns a duration in seconds, minutes or hours: `1 h 31 min`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def format_name(name: str) -> str:
    """Returns a name, or a text with names in it, as UTF-8 can hold it: with a question mark for
    each byte of a file's name that is no part of a character."""
    return name.encode("utf-8", "replace").decode("utf-8")


def format_architecture(config: ModelConfig) -> str:
    """Returns a model's shape: `12 x 512, 8 experts, top-2`."""
    kind = f"{config.num_experts} experts, top-{config.top_k}" if config.num_experts else "dense"
    return f"{config.n_layers} x {config.d_model}, {kind}"


def format_params(total: int, active: int) -> str:
    """Returns a number of parameters: `246 M`, or `90.3 M of 246 M` if a token passes through fewer
    than all."""
    count = format_number(total)
    return count if active == total else f"{format_number(active)} of {count}"


def format_table(rows: TableRows) -> list[str]:
    """Returns the lines of a table, the first column aligned left and the others right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([f"{first:<{widths[0]}}", *cells]))
    return lines


def format_markdown_table(rows: TableRows) -> list[str]:
    """Returns the lines of a table in Markdown, the first row as its head."""
    head, *body = rows
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *body)]
