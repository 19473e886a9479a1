"""A file of the user's own takes the place of a preset."""

from dataclasses import replace

import pytest

from config import InputError, Phase, Widen, tiny
from utils.runtime.cli import find_preset, parse_run

HEAD = "from dataclasses import replace\nfrom config import Phase, Run, Widen, full, tiny\n"
ONE = """
def _helper() -> Run:
    return full()

def sized(width: int) -> Run:
    return replace(full(), model=replace(full().model, d_model=width))

def phases():
    return {"a": Phase(steps=3), "b": Phase(Widen(2), steps=4)}

def mine() -> Run:
    "Two phases."
    return replace(tiny(), training=full().training, phases=phases(), seed=9)
"""
TWO = "\ndef first() -> Run:\n    return tiny()\n\ndef second() -> Run:\n    return full()\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A function that writes a file into the working folder. Returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "my_schedule.py") -> str:
        (tmp_path / name).write_text(HEAD + text)
        return name

    return write


def test_the_only_function_that_returns_a_run_is_the_preset(write):
    run = parse_run([write(ONE), "--phases.b.growth.factor", "3", "--phases.a.lr", "0.5"])
    phases = {"a": Phase(steps=3, lr=0.5), "b": Phase(Widen(3), steps=4)}
    assert run == replace(tiny(), training=run.training, phases=phases, seed=9)


def test_one_of_several_functions_is_named_after_a_colon(write):
    name = write(TWO)
    assert find_preset(f"{name}:first") == tiny() != find_preset(f"{name}:second")
    assert find_preset(f"./{name}:second") == find_preset("full")


def test_its_help_shows_its_own_defaults(write, capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        parse_run([write(ONE), "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--phases.a.steps INT Optimizer steps. (default: 3)" in text
    assert "(default: 9)" in text and "train.py my_schedule.py" in text


@pytest.mark.parametrize(
    "text, name, message",
    [
        ("", ":nobody", "my_schedule.py has no function that returns a Run: def nobody() -> Run"),
        ("def f(): return tiny()", "", "my_schedule.py has no function that returns a Run"),
        (TWO, "", "several presets: my_schedule.py:first or my_schedule.py:second"),
        (TWO, ":third", "my_schedule.py has no def third() -> Run, only my_schedule.py:first or"),
        ("def f() -> Run: return 3", "", "my_schedule.py: f() returned 3, which is no Run"),
        ("def f() -> Run:\n    return 1 +", "", "my_schedule.py, line 4: SyntaxError: invalid"),
        ("x = 1 / 0", "", "my_schedule.py, line 3: ZeroDivisionError: division by zero"),
        ("import nothing_so_named", "", "my_schedule.py, line 3: ModuleNotFoundError: No module"),
        (
            "def f() -> Run:\n    return Run(phases={'a': Phase(steps=60.5)})", "",
            "my_schedule.py, line 4: steps = 60.5 must be a whole number",
        ),
        ("def f() -> Run:\n    return Run(seeds=3)", "", "my_schedule.py, line 4: TypeError: "),
    ],
)  # fmt: skip
def test_what_is_wrong_with_it_is_said_with_its_line(text, name, message, write):
    with pytest.raises(InputError) as raised:
        find_preset(write(text) + name)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_that_is_not_there_or_cannot_be_read_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.py").mkdir()
    for name in ("none.py", "folder.py"):
        with pytest.raises(InputError, match=f"^{name}: .*Error: "):
            find_preset(name)


def test_a_users_file_may_use_what_lies_beside_it_and_annotations_of_any_form(write, tmp_path):
    (tmp_path / "sizes_of_mine.py").write_text("STEPS = 7\n")
    text = """
from dataclasses import dataclass
import config
from sizes_of_mine import STEPS

@dataclass
class Length:
    steps: int = STEPS

def mine() -> config.Run:
    return replace(tiny(), phases={"a": Phase(steps=Length().steps)}, training=full().training)
"""
    name = write(text)
    path = tmp_path / name
    path.write_text(f"from __future__ import annotations\n{path.read_text()}")
    assert find_preset(name).phases == {"a": Phase(steps=7)}
