"""What tyro says, as plain text: its errors as one line, its help laid out anew.

tyro draws both in boxes, for the width and the colours of the terminal that it finds. Here it finds
none, and so writes

     options
     ---------------------------------
      --seed INT
            Seed of the initial weights, the batches and the samples. (default: 0)
"""

import io
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from shutil import get_terminal_size
from textwrap import indent
from typing import NamedTuple, TypeVar

from config import InputError
from utils.runtime.formatting import wrap_lines

T = TypeVar("T")
ERROR_COLUMNS, HELP_COLUMNS = 100_000, 129
"""Terminals for tyro to write for: one that wraps no line, and the widest in which it does not put
the groups of a help beside each other."""
MIN_HELP_WIDTH, MAX_HELP_WIDTH = 40, 100
RULE = re.compile(r" *-+")
PLAIN_PHRASES = {
    r"invalid literal for int\(\) with base 10: (.+)": r"\1 is no whole number",
    r"could not convert string to float: (.+)": r"\1 is no number",
    r"no type matching \{None\}\|INT could .+ from \[(.+)\]": r"\1 is no whole number, nor None",
    r"no type matching \{None\}\|FLOAT could .+ from \[(.+)\]": r"\1 is no number, nor None",
}
"""What Python and tyro say of a value, and in plain words."""
UNKNOWN = "Unrecognized options: "


class OptionGroup(NamedTuple):
    """Options under one title, as the help shows them."""

    title: str
    description: str
    options: dict[str, str]
    """What each option does, by how it is written (`--seed INT`)."""


def parse_plainly(
    parse: Callable[..., T], args: list[str], first: Collection[str] = (), hint: str = ""
) -> T:
    """Returns what a call of tyro makes of `args`. Prints its help, the options `first` before all
    others.

    Raises:
        InputError: ending in `hint`, for arguments that tyro refuses.
        SystemExit: after the help.
    """
    output, complaint = io.StringIO(), io.StringIO()
    try:
        columns = HELP_COLUMNS if {"-h", "--help"} & set(args) else ERROR_COLUMNS
        with terminal_of(columns), redirect_stdout(output), redirect_stderr(complaint):
            return parse(args=args)
    except SystemExit as stop:
        if stop.code:
            raise InputError(summarise_error(complaint.getvalue()) + hint) from None
    text = output.getvalue()
    print(layout_help(text, first) if text.startswith("usage:") else text)
    sys.exit(0)


@contextmanager
def terminal_of(columns: int) -> Iterator[None]:
    """Gives the terminal a width, as far as programs ask for it."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(columns)
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def summarise_error(text: str) -> str:
    """Returns an error of tyro's as one line: the complaint, then what was probably meant."""
    sections: list[list[str]] = [[]]
    for line in map(str.rstrip, text.splitlines()[2:]):  # below the title and its rule
        if RULE.fullmatch(line):
            sections.append([])
        else:
            sections[-1].append(line)
    complaint, *others = sections
    hints = [describe_hint(*map(str.strip, section)) for section in others if section]
    return "; ".join(filter(None, [describe_complaint(complaint), *sorted(hints)]))


def describe_complaint(lines: list[str]) -> str:
    """Returns the first section of an error as one line."""
    end = lines.index("") if "" in lines else len(lines)  # below: how each type was tried
    complaint = " ".join(map(str.strip, lines[:end])).rstrip(".")
    complaint = complaint.removesuffix(". Expected 1 values")
    for pattern, phrase in PLAIN_PHRASES.items():
        complaint = re.sub(pattern, phrase, complaint)
    if complaint.startswith(f"{UNKNOWN}-"):  # the values behind them are no options
        words = complaint.removeprefix(UNKNOWN).split(", ")
        return UNKNOWN + ", ".join(word for word in words if word.startswith("-"))
    if complaint.startswith("Missing from "):
        names = [line.strip() for line in lines if re.match(r" {6}\S", line)]
        return f"missing: {', '.join(names)}"
    failure = re.fullmatch(r"Error parsing (\S+): (.*)", complaint)
    if failure is None:
        return complaint
    place, reason = failure[1], failure[2]
    parent, _, section = place.replace("-", "_").rpartition(".")
    if place.startswith("--"):
        return f"{place}: {reason}"
    if place[0].isupper() or reason.startswith(f"{parent}.{section}."):  # a class, or named twice
        return reason
    if reason.startswith(f"{section}."):
        return f"{parent}.{reason}" if parent else reason
    return f"{place}: {reason}"


def describe_hint(title: str, *lines: str) -> str:
    """Returns what was probably meant, given another section of an error; else nothing."""
    options = " or ".join([line.split()[0].strip(",") for line in lines if line[:2] == "--"][:3])
    if title == "Perhaps you meant:":
        return f"perhaps you meant {options}"
    if title.startswith("Arguments similar to "):
        return f"perhaps {options} in place of {title.split()[-1].rstrip(':')}"
    if title == UNKNOWN.strip():
        return f"{title} {', '.join(lines)}"
    return title if title.startswith("Available ") else ""


def layout_help(text: str, first: Collection[str]) -> str:
    """Returns a help of tyro's, wrapped for the terminal. The options `first` come in a group of
    their own before all others."""
    paragraphs, groups = split_help(text)
    named = {names.split()[0].strip(","): names for g in groups for names in g.options}
    chosen = [named[name] for name in first if name in named]
    docs = {names: doc for group in groups for names, doc in group.options.items()}
    groups = [
        OptionGroup("most used", "", {names: docs[names] for names in chosen}),
        *(
            group._replace(options={k: v for k, v in group.options.items() if k not in chosen})
            for group in groups
        ),
    ]
    width = max(MIN_HELP_WIDTH, min(get_terminal_size().columns, MAX_HELP_WIDTH))
    parts = [fill_indented(paragraph, width, 0) for paragraph in paragraphs]
    for group in filter(lambda group: group.options, groups):
        rows = [f"{group.title}:"]
        rows += [fill_indented(group.description, width, 2)] if group.description else []
        for names, doc in group.options.items():
            rows += [
                fill_indented(names, width, 2),
                *([fill_indented(doc, width, 6)] if doc else []),
            ]
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def fill_indented(text: str, width: int, columns: int) -> str:
    """Returns a text wrapped to `width`, each line of it indented by `columns`."""
    return indent(wrap_lines(text, indent=0, width=width - columns), columns * " ")


def split_help(text: str) -> tuple[list[str], list[OptionGroup]]:
    """Returns the paragraphs before the options in a help of tyro's, and its groups of options."""
    lines = [line.rstrip() for line in text.replace("    • ", "  ").splitlines()]
    titles = [i - 1 for i, line in enumerate(lines) if re.fullmatch(r" -+", line)]
    head = "\n".join(lines[: titles[0]]).strip()
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\n+", head)]
    groups = []
    for start, end in zip(titles, [*titles[1:], len(lines)], strict=True):
        body = lines[start + 2 : end]
        rules = [i for i, line in enumerate(body) if RULE.fullmatch(line)]
        description = " ".join(" ".join(body[: rules[0]]).split()) if rules else ""
        options, names = dict[str, str](), ""
        for line in filter(None, body[rules[0] + 1 :] if rules else body):
            if option := re.fullmatch(r"  (\S.*?)(?:  +(\S.*))?", line):
                names = option[1]
                options[names] = option[2] or ""
            else:
                options[names] = f"{options[names]} {line.strip()}".strip()
        options.pop("(required)", None)
        groups.append(OptionGroup(lines[start].strip(), description, options))
    return paragraphs, groups
