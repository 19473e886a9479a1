"""Numbers, sizes, times, models and tables as people read them, in lines that fit a terminal."""

from collections.abc import Iterable
from textwrap import TextWrapper

from config import ModelConfig

LINE_WIDTH = 80
"""Characters of a line: what every terminal has."""

TableRows = list[tuple[str, ...]]


def format_number(number: float) -> str:
    """Returns three digits and a unit: `64.3 M`."""
    number = float(f"{number:.3g}")  # rounding may reach the next unit
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


def format_gb(size: float) -> str:
    """Returns a size in GB (10^9 bytes), or in a smaller unit below a tenth of one: `17.4 GB`,
    `64.0 MB`."""
    for unit in ("GB", "MB", "kB"):
        if size >= 0.1:
            return f"{size:.1f} {unit}"
        size *= 1000
    return f"{size:.0f} bytes"


def list_some(names: Iterable[object], count: int = 4) -> str:
    """Returns the first few of some names as one phrase, and how many more there are."""
    texts = [str(name) for name in names]
    more = f" and {len(texts) - count} more" if len(texts) > count else ""
    return ", ".join(texts[:count]) + more


def format_duration(seconds: float) -> str:
    """Returns a duration in seconds, minutes or hours: `0.4 s`, `1 h 31 min`."""
    if seconds < 1:
        return f"{seconds:.1g} s"
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


def format_table(rows: TableRows, num_keys: int = 1) -> list[str]:
    """Returns the lines of a table, the first column aligned left and the others right. Columns
    that LINE_WIDTH has no room for go on below, beside the first `num_keys` columns once more."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    blocks = [[*range(num_keys)]]
    for column in range(num_keys, len(widths)):
        line_width = sum(widths[i] + 2 for i in blocks[-1]) + widths[column]
        if line_width > LINE_WIDTH and len(blocks[-1]) > num_keys:
            blocks.append([*range(num_keys)])
        blocks[-1].append(column)
    lines = []
    for block in blocks:
        lines += [
            "",
            *("  ".join(f"{row[i]:{'>' if i else '<'}{widths[i]}}" for i in block) for row in rows),
        ]
    return lines[1:]


def wrap_lines(text: str, indent: int = 4, width: int = LINE_WIDTH) -> str:
    """Returns a text with each line that is longer than `width` broken between words, and what goes
    on in the next line indented. No word is broken: it may be a path."""
    wrapper = TextWrapper(
        width=width,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(map(wrapper.fill, text.split("\n")))


def join_parts(parts: Iterable[str]) -> str:
    """Returns short texts side by side, in more than one line where LINE_WIDTH has no room. No text
    is broken."""
    unbreakable = (part.replace(" ", "\0") for part in parts)
    return wrap_lines("  ".join(unbreakable)).replace("\0", " ")


def format_markdown_table(rows: TableRows) -> list[str]:
    """Returns the lines of a table in Markdown, the first row as its head."""
    head, *body = rows
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *body)]
