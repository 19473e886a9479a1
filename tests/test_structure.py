"""Laws of the source itself: imports go one way, every public name means one thing, and what users
read is written in whole sentences."""

import ast
import subprocess
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
RANKS = [
    {"config"},
    {"models"},
    {"transfer"},
    {"utils.runtime"},
    {"utils.text"},
    {"utils.data"},
    {"utils.schedule"},
    {"utils.optim"},
    {"utils.metrics"},
    {"utils.plot", "utils.checkpoint"},
    {"utils.generate", "utils.hf"},
    {"utils.training", "transfer.proof"},
    {"train", "utils.benchmark", "utils.experiment", "transfer.verify_growth_mechanics"},
]
"""Rooms from the bottom to the top: a module imports from its own room and from those below."""
REPEATED_NAMES = {"__all__", "main", "T", "P"}
FRAGMENTS = ("Of ", "And ", "By ", "As ", "That of ")
COMMANDS = {
    "train.py": ["train.py", "--help"],
    "train.py tiny": ["train.py", "tiny", "--help"],
    "verify": ["transfer/verify_growth_mechanics.py", "--help"],
    "generate": ["-m", "utils.generate", "--help"],
    "plot": ["-m", "utils.plot", "--help"],
    "hf": ["-m", "utils.hf", "--help"],
    "hf export": ["-m", "utils.hf", "export", "--help"],
    "hf import": ["-m", "utils.hf", "import", "--help"],
    "hf grow": ["-m", "utils.hf", "grow", "--help"],
    "benchmark": ["-m", "utils.benchmark", "--help"],
    "experiment": ["-m", "utils.experiment", "noise", "tiny", "--help"],
    "experiment report": ["-m", "utils.experiment", "report", "--help"],
    "experiment keep": ["-m", "utils.experiment", "keep", "--help"],
}

LATE_LIBRARIES = {
    "datasets", "huggingface_hub", "matplotlib", "pyarrow", "tensorboard", "transformers", "tyro",
    "wandb",
}  # fmt: skip
"""Libraries that only what uses them imports: a call of the functions that train works without
them, and each costs time at every start."""


def source_files() -> list[Path]:
    folders = (ROOT / name for name in ("models", "transfer", "utils"))
    files = [path for folder in folders for path in folder.rglob("*.py") if path.stat().st_size]
    return [ROOT / "config.py", ROOT / "train.py", *files]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> tuple[int, str] | None:
    """The rank and name of a module's room; None for a module of another library."""
    rooms = [
        (rank, room)
        for rank, names in enumerate(RANKS)
        for room in names
        if module == room or module.startswith(f"{room}.")
    ]
    return max(rooms, key=lambda room: len(room[1]), default=None)


def imported_modules(tree: ast.AST) -> set[str]:
    """Every module that a file imports, wherever in the file, functions included."""
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import hides where it goes"
            module = node.module or ""
            # `from utils.text import sources` imports the module utils.text.sources.
            submodules = {f"{module}.{alias.name}" for alias in node.names}
            is_file = {name for name in submodules if is_module(name)}
            modules |= is_file or {module}
    return modules


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def upward_imports(path: Path, source: str) -> list[str]:
    room = room_of(module_name(path))
    assert room is not None, f"{path} lies in no room"
    return [
        f"{module_name(path)} imports {imported}"
        for imported in sorted(imported_modules(ast.parse(source)))
        if (other := room_of(imported)) and other[1] != room[1] and other[0] >= room[0]
    ]


def test_imports_go_one_way():
    found = [line for path in source_files() for line in upward_imports(path, path.read_text())]
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        "from utils.training.phase import train_phase",
        "def f():\n    import utils.training.phase",
        "def f():\n    from utils.training import phase",
        "import train",
    ],
)
def test_an_import_that_goes_up_is_noticed(line):
    assert upward_imports(ROOT / "utils" / "metrics" / "history.py", line)


def test_no_import_hides_from_these_tests():
    hidden = ("import_module", "__import__")
    names = {
        (module_name(path), getattr(node, "attr", getattr(node, "id", "")))
        for path in source_files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute | ast.Name)
    }
    assert not [(module, name) for module, name in names if name in hidden]


def test_no_file_imports_a_command():
    found = {
        (module_name(path), imported)
        for path in source_files()
        for imported in imported_modules(ast.parse(path.read_text()))
        if imported.endswith("__main__") or imported == "train"
    }
    assert not found


def test_every_command_ends_as_run_command_says():
    bodies = [path.read_text().partition("\nif __name__ == ")[2] for path in source_files()]
    commands = [body for body in bodies if body.startswith('"__main__":\n')]
    assert len(commands) >= 6 and all("run_command(" in body for body in commands)


def test_packages_of_utils_import_nothing_by_themselves():
    assert not [p for p in (ROOT / "utils").rglob("__init__.py") if p.read_text().strip()]


def test_training_starts_without_the_libraries_that_it_may_not_need():
    code = "import sys, train, transfer, utils.training.phase; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not LATE_LIBRARIES & set(done.stdout.split())


def test_every_library_is_declared_and_pinned_to_a_version_that_is_allowed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    required = list(map(Requirement, project["project"]["dependencies"]))
    tests, lint = (map(Requirement, project["dependency-groups"][name]) for name in ("dev", "lint"))
    files = {"requirements.txt": [*required, *tests], "requirements-lint.txt": list(lint)}
    for file, libraries in files.items():
        lines = (ROOT / file).read_text().splitlines()
        pins = dict(line.split("==") for line in lines)
        allowed = {library.name: library.specifier for library in libraries}
        assert pins.keys() == allowed.keys(), file
        assert not {name: pin for name, pin in pins.items() if pin not in allowed[name]}, file
    imported = {
        canonicalize_name(module.split(".")[0])
        for path in source_files()
        for module in imported_modules(ast.parse(path.read_text()))
        if room_of(module) is None
    }
    extras = project["project"]["optional-dependencies"].values()
    optional = {Requirement(line).name for lines in extras for line in lines}
    foreign = imported - {canonicalize_name(name) for name in sys.stdlib_module_names}
    assert foreign - optional - {"triton"} == {library.name for library in required}


def public_names(tree: ast.Module) -> set[str]:
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return {name for name in names if not name.startswith("_")} - REPEATED_NAMES


def test_no_public_name_means_two_things():
    modules = defaultdict(list)
    for path in source_files():
        for name in public_names(ast.parse(path.read_text())):
            modules[name].append(module_name(path))
    assert not {name: where for name, where in modules.items() if len(where) > 1}


def test_every_public_function_and_class_says_what_it_is():
    missing = []
    for path in source_files():
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree) or path.name == "__init__.py", f"{path} has no docstring"
        for node in tree.body:
            is_public = isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"
            if is_public and not ast.get_docstring(node) and node.name != "main":
                missing.append(f"{module_name(path)}.{node.name}")
    assert not missing


def docstrings(tree: ast.AST) -> list[tuple[int, str]]:
    return [
        (node.lineno, node.value.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]


def test_no_docstring_begins_as_a_fragment():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text.strip().splitlines()[0]}"
        for path in source_files()
        for line, text in docstrings(ast.parse(path.read_text()))
        if text.strip().startswith(FRAGMENTS)
    ]
    assert not found


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_help_imports_only_what_reads_options_and_begins_no_line_as_a_fragment(command):
    timed = [sys.executable, "-X", "importtime", *command]
    done = subprocess.run(timed, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "tyro" in imported and not imported & {"numpy", "torch", *LATE_LIBRARIES - {"tyro"}}
    lines = [line.strip("│ ") for line in done.stdout.splitlines()]
    assert not [line for line in lines if line.startswith(FRAGMENTS)]
