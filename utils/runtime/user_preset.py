"""A preset in a file of the user's own."""

import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from config import InputError, Run, find_presets, require

USER_FILE = re.compile(r"(.+\.py)(?::(\w+))?")
"""How the command line names one: FILE.py, or FILE.py:FUNCTION where the file has several."""


def load_preset(name: str) -> Run:
    """Returns the run of a function in a user's file: of the only one annotated `-> Run`, or of the
    one that `name` names after a colon (see USER_FILE).

    Raises:
        InputError: where there is no such file or function, or it returns no Run. What the file
            itself raises is told with its line.
    """
    match = USER_FILE.fullmatch(name)
    assert match is not None, name
    path, function = match.groups()
    module = ModuleType(path)
    module.__file__ = path
    with explain_errors(path):
        with open(path, "rb") as file:
            code = compile(file.read(), path, "exec")
        sys.modules[path] = module  # where dataclasses look for what their annotations name
        sys.path.append(str(Path(path).resolve().parent))  # for modules that lie beside it
        exec(code, module.__dict__)
    presets = find_presets(module.__dict__)
    example = f"def {function or 'my_schedule'}() -> Run"
    require(bool(presets), f"{path} has no function that returns a Run: {example}")
    choices = " or ".join(f"{path}:{choice}" for choice in presets)
    require(len(presets) == 1 or function is not None, f"{path} has several presets: {choices}")
    require(function in (None, *presets), f"{path} has no {example}, only {choices}")
    function = function or next(iter(presets))
    with explain_errors(path):
        run = presets[function]()
    require(isinstance(run, Run), f"{path}: {function}() returned {run!r}, which is no Run")
    return run


@contextmanager
def explain_errors(path: str) -> Iterator[None]:
    """Raises whatever a user's file raises as an InputError that names the file and its line."""
    try:
        yield
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        if isinstance(error, SyntaxError) and error.filename == path:
            lines = [error.lineno]
        place = f"{path}, line {lines[-1]}" if lines else path
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        reason = error.msg if isinstance(error, SyntaxError) else error
        reason = error.strerror if isinstance(error, OSError) and not lines else reason
        raise InputError(f"{place}: {kind}{reason}") from error
