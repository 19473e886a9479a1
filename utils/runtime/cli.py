"""From the command line to a call: presets, overrides, and what an error looks like."""

import io
import os
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from dataclasses import fields
from difflib import get_close_matches
from functools import partial
from inspect import cleandoc
from pathlib import Path
from typing import TypeVar

from config import PRESETS, InputError, ModelConfig, Run, require
from utils.runtime.errors import RunStopped
from utils.runtime.signals import Stopped, raise_on_signals

EXIT_INPUT_ERROR, EXIT_RUN_STOPPED, EXIT_PIPE_CLOSED = 2, 1, 141
T = TypeVar("T")


def run_command(command: Callable[[], None]) -> None:
    """Runs `command` and exits: with 0, or with one line on stderr and 2 for bad input, 1 for a run
    that had to stop, 128 + its number for a signal (130 for Ctrl-C), 141 if nobody reads on
    (`| head`). What a terminal cannot show is written as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with raise_on_signals(owns_process=True):
            command()
    except InputError as error:
        exit_with(f"error: {error}", EXIT_INPUT_ERROR)
    except RunStopped as error:
        exit_with(f"stopped: {error}", EXIT_RUN_STOPPED)
    except Stopped as stop:
        exit_with(str(stop), stop.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # flushed at exit
        sys.exit(EXIT_PIPE_CLOSED)


def exit_with(message: str, code: int) -> None:
    """Prints a line on stderr, unless the terminal has gone, and exits."""
    with suppress(OSError):
        print(message, file=sys.stderr)
    sys.exit(code)


def decode_argument(name: str, value: str) -> str:
    """Returns an argument as text, also where the locale is not UTF-8 and the argument is.

    Raises:
        InputError: with the argument's `name`, for bytes that are no text.
    """
    try:
        return value.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise InputError(f"{name} = {value!r} is not text in UTF-8") from None


def parse_run(
    args: list[str], adopt_settings: Callable[[Run, Path], Run] = lambda default, out: default
) -> Run:
    """Parses `[PRESET] [--field value ...]`.

    Args:
        args: The arguments.
        adopt_settings: Called for a run to be resumed, with the preset's run and the folder.
            Returns the run whose values the fields take that `args` do not set.

    Raises:
        InputError: for arguments that make no run.
    """
    preset, overrides = "full", args
    if args and not args[0].startswith("-"):
        preset, *overrides = args
    default = find_preset(preset)
    presets = "\n\n".join(f"{name}: {make.__doc__}" for name, make in PRESETS.items())
    parse = partial(
        parse_flags,
        Run,
        overrides,
        prog=f"train.py {preset}",
        description=f"{Run.__doc__}\n\ntrain.py [PRESET] [--field value ...]\n\n{presets}"
        f"\n\nThe defaults below are those of {preset}.",
        hint="; the preset comes first" if PRESETS.keys() & set(overrides) else "",
    )
    run = parse(default=default)
    if run.resume:
        run = parse(default=adopt_settings(default, run.out))
    check_init_from(run, default.model)
    return run


def find_preset(name: str) -> Run:
    """Returns a preset's run. Raises InputError, which lists them, where there is none so named."""
    if name not in PRESETS:
        nearest = get_close_matches(name, PRESETS, n=1)
        hint = f"; perhaps you meant {nearest[0]}" if nearest else ""
        raise InputError(f"there is no preset {name}, only {', '.join(PRESETS)}{hint}")
    return PRESETS[name]()


def check_init_from(run: Run, default: ModelConfig) -> None:
    """Raises InputError where the model is both taken from elsewhere and described."""
    changed = [
        f"model.{field.name} = {value}"
        for field in fields(ModelConfig)
        if field.name != "seq_len"
        and (value := getattr(run.model, field.name)) != getattr(default, field.name)
    ]
    require(
        not (run.init_from and changed),
        f"init_from = {run.init_from} brings its own model: {', '.join(changed)} cannot be set",
    )


def parse_flags(
    kind: type[T], args: list[str], default: T, prog: str, description: str, hint: str = ""
) -> T:
    """Parses `--field value ...` into a dataclass.

    Raises:
        InputError: ending in `hint`, for arguments that do not make one.
    """
    import tyro

    stderr = io.StringIO()
    try:
        with redirect_stderr(stderr):
            return tyro.cli(
                kind,
                args=args,
                default=default,
                prog=prog,
                description=cleandoc(description),
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(unframe(stderr.getvalue()) + hint) from None


def unframe(box: str) -> str:
    """Returns what tyro says in a frame of several lines as one line: the complaint, then what was
    probably meant."""
    lines = [line.strip("│╭╮╰╯|+ ") for line in box.splitlines()]
    text = " ".join(line for line in lines[1:] if line)
    complaint, *others = filter(str.strip, re.split(r"[─-]{3,}", text))
    hints = " ".join(part for part in others if "Perhaps you meant" in part)
    meant = re.findall(r"(?<= )--[\w.-]+", hints)
    return complaint.strip() + (f"; perhaps you meant {' or '.join(meant[:3])}" if meant else "")
