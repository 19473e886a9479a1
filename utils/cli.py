"""From the command line to a call: presets, overrides, and what an error looks like."""

import io
import os
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import fields
from difflib import get_close_matches
from typing import TypeVar

from config import PRESETS, InputError, ModelConfig, Run, require
from utils.errors import RunStopped
from utils.signals import Stopped, stoppable

INPUT_ERROR, RUN_STOPPED, PIPE_CLOSED = 2, 1, 141
T = TypeVar("T")


def run_command(command: Callable[[], None]) -> None:
    """Runs `command` and exits: 0, or one line on stderr and 2 for bad input, 1 for a run that had
    to stop, 130 for Ctrl-C, 143 for SIGTERM, 141 if nobody reads on (`| head`)."""
    try:
        with stoppable():
            command()
    except InputError as error:
        leave(f"error: {error}", INPUT_ERROR)
    except RunStopped as error:
        leave(f"stopped: {error}", RUN_STOPPED)
    except Stopped as stop:
        leave(str(stop), stop.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # flushed at exit
        sys.exit(PIPE_CLOSED)


def leave(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    sys.exit(code)


def parse(args: list[str]) -> Run:
    """`[PRESET] [--field value ...]` -> Run. Raises InputError where it cannot be one."""
    preset, overrides = "full", args
    if args and not args[0].startswith("-"):
        preset, *overrides = args
    if preset not in PRESETS:
        nearest = get_close_matches(preset, PRESETS, n=1)
        hint = f"; perhaps you meant {nearest[0]}" if nearest else ""
        raise InputError(f"there is no preset {preset}, only {', '.join(PRESETS)}{hint}")
    presets = "\n\n".join(f"{name}: {make.__doc__}" for name, make in PRESETS.items())
    run = flags(
        Run,
        overrides,
        default=PRESETS[preset](),
        prog=f"train.py {preset}",
        description=f"{Run.__doc__}\n\ntrain.py [PRESET] [--field value ...]\n\n{presets}"
        f"\n\nThe defaults below are those of {preset}.",
        hint="; the preset comes first" if PRESETS.keys() & set(overrides) else "",
    )
    check_origin(run, PRESETS[preset]().model)
    return run


def check_origin(run: Run, default: ModelConfig) -> None:
    """Raises InputError where the model is both taken from elsewhere and described."""
    told = [
        f"model.{field.name} = {value}"
        for field in fields(ModelConfig)
        if field.name != "seq_len"
        and (value := getattr(run.model, field.name)) != getattr(default, field.name)
    ]
    require(
        not (run.init_from and told),
        f"init_from = {run.init_from} brings its own model: {', '.join(told)} cannot be set",
    )


def flags(
    kind: type[T], args: list[str], default: T, prog: str, description: str, hint: str = ""
) -> T:
    """`--field value ...` -> a dataclass. Raises InputError, ending in `hint`, if it can't be."""
    import tyro

    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(
                kind,
                args=args,
                default=default,
                prog=prog,
                description=description,
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(unframed(said.getvalue()) + hint) from None


def unframed(box: str) -> str:
    """What tyro says in a frame of several lines, as one: the complaint, then what was meant."""
    lines = [line.strip("│╭╮╰╯|+ ") for line in box.splitlines()]
    text = " ".join(line for line in lines[1:] if line)
    complaint, *others = filter(str.strip, re.split(r"[─-]{3,}", text))
    hints = " ".join(part for part in others if "Perhaps you meant" in part)
    meant = re.findall(r"(?<= )--[\w.-]+", hints)
    return complaint.strip() + (f"; perhaps you meant {' or '.join(meant[:3])}" if meant else "")
