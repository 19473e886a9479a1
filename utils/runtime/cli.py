"""From the command line to a call: presets, overrides, help, and what an error looks like."""

import io
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields
from difflib import get_close_matches
from functools import partial, wraps
from inspect import cleandoc
from pathlib import Path
from typing import Any, TypeVar

from config import PRESETS, InputError, ModelConfig, Run, require
from utils.runtime.errors import RunStopped
from utils.runtime.openmp import limit_spinning
from utils.runtime.plain_tyro import parse_plainly
from utils.runtime.signals import Stopped, raise_on_signals
from utils.runtime.user_preset import USER_FILE, load_preset

EXIT_INPUT_ERROR, EXIT_RUN_STOPPED, EXIT_PIPE_CLOSED = 2, 1, 141
T = TypeVar("T")


def run_command(command: Callable[[], None]) -> None:
    """Runs `command` and exits: with 0, or with one line on stderr and 2 for bad input, 1 for a run
    that had to stop, 128 + its number for a signal (130 for Ctrl-C), 141 if nobody reads on
    (`| head`). What a terminal cannot show is written as an escape."""
    limit_spinning()
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
    presets = [f"{name}: {make.__doc__}" for name, make in PRESETS.items()]
    usage = "train.py [PRESET] [--field value ...]"
    own = "PRESET is one of these, or a file with a function of your own that returns a Run:"
    parse = partial(
        parse_flags,
        Run,
        overrides,
        prog=f"train.py {preset}",
        description="\n\n".join(
            [
                Run.__doc__ or "",
                usage,
                f"{own} my_schedule.py.",
                *presets,
                f"The defaults below are those of {preset}.",
            ]
        ),
        first=first_options(default),
        hint="; the preset comes first" if PRESETS.keys() & set(overrides) else "",
    )
    run = parse(default=default)
    if run.resume:
        run = parse(default=adopt_settings(default, run.out))
    check_init_from(run, default.model)
    return run


def first_options(default: Run) -> tuple[str, ...]:
    """Returns the options of train.py that most people need, for a preset's run."""
    phase = next(iter(default.phases), None)
    steps, batch_size = ("training.steps-phase1", "training.batch-size")
    if phase is not None:
        steps, batch_size = f"phases.{phase}.steps", f"phases.{phase}.batch-size"
    names = ["out", "resume", "dry-run", "data.source", "data.tokenizer", steps, batch_size]
    return tuple(f"--{name.replace('_', '-')}" for name in [*names, "init-from", "seed", "device"])


def find_preset(name: str) -> Run:
    """Returns the run of a preset, or of a function in a user's file (`FILE.py`, `FILE.py:NAME`).

    Raises:
        InputError: where there is none so named, with a list of those that are there, or where it
            makes no run.
    """
    if USER_FILE.fullmatch(name):
        return load_preset(name)
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
    kind: type[T],
    args: list[str],
    default: T,
    prog: str,
    description: str,
    first: tuple[str, ...] = (),
    hint: str = "",
) -> T:
    """Parses `--field value ...` into a dataclass. `--help` shows the options `first` before all
    others.

    Raises:
        InputError: ending in `hint`, for arguments that do not make one.
    """
    import tyro

    config = (tyro.conf.AvoidSubcommands,)
    parse = partial(tyro.cli, kind, default=default, config=config)
    parse = partial(parse, prog=prog, description=cleandoc(description))
    return parse_plainly(parse, args, first, hint)


def parse_call(command: Callable[..., None], args: list[str], prog: str) -> Callable[[], None]:
    """Parses the arguments of a function, those without a default by position. Returns the call.

    Raises:
        InputError: for arguments that it cannot be called with.
    """
    import tyro

    parse = partial(tyro.cli, bind(command), prog=prog, config=positional_config())
    return parse_plainly(parse, args)


def bind(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """Returns a function that takes what `command` takes and returns the call of it."""

    @wraps(command)
    def bound(*values: Any, **options: Any) -> Callable[[], None]:
        return partial(command, *values, **options)

    return bound


def positional_config() -> tuple[Any, ...]:
    """Returns how tyro reads the arguments of a function."""
    from tyro import conf

    return conf.OmitArgPrefixes, conf.PositionalRequiredArgs, conf.PositionalMetavarFromFieldName


def parse_subcommand(
    commands: Mapping[str, Callable[..., None]], args: list[str], prog: str, description: str
) -> Callable[[], None]:
    """Parses `NAME ARGUMENTS` for the function with that name in `commands`. Returns the call.

    Raises:
        InputError: for arguments that name no function, or that it cannot be called with.
    """
    import tyro

    bound = {name: bind(command) for name, command in commands.items()}
    config = positional_config()
    parse = partial(tyro.extras.subcommand_cli_from_dict, bound, config=config)
    return parse_plainly(partial(parse, prog=prog, description=description), args)
