"""The documentation says what the code says."""

import ast
import re
from itertools import pairwise
from pathlib import Path

from train import main
from utils.experiment.records import report_of, split_runs
from utils.metrics.history import read_history, select_events
from utils.metrics.history_fields import ALWAYS, EVENT_TIMES, HISTORY_FIELDS
from utils.runtime.cli import find_preset, parse_run
from utils.runtime.formatting import format_markdown_table

ROOT = Path(__file__).parents[1]
CONFIGURATION = ROOT / "docs" / "configuration.md"


def field_docs() -> dict[tuple[str, str], str]:
    """The doc of each field of each dataclass in config.py that has a doc of its own."""
    classes = [
        n for n in ast.parse((ROOT / "config.py").read_text()).body if isinstance(n, ast.ClassDef)
    ]
    return {
        (node.name, field.target.id): doc.value.value
        for node in classes
        for field, doc in pairwise(node.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(doc, ast.Expr)
        and isinstance(doc.value, ast.Constant)
    }


def plain(text: str) -> str:
    return " ".join(re.sub(r"[`\\]", "", text).split())


def test_the_table_of_fields_has_the_doc_of_every_field():
    table, docs = plain(CONFIGURATION.read_text()), field_docs()
    # Fields that hold other dataclasses have tables or sections of their own.
    nested = {"growth", "tolerance", "phases", "rope_scaling", "upcycle", "widen", "deepen"}
    options = {key: doc for key, doc in docs.items() if key[1] not in nested and key[0] != "Range"}
    assert len(options) > 70
    assert not [key for key, doc in options.items() if plain(doc) not in table]


def test_the_schedule_of_ones_own_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"as `(\w+\.py)`:\n\n```python\n(.*?)```", CONFIGURATION.read_text(), re.S)
    ((name, text),) = blocks
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(text)
    phases = list(find_preset(name).phases)
    assert len(phases) == 4
    flags = f"--out run --data.cache {tmp_path} --data.builtin-stories 200 --device cpu "
    flags += "--model.d-model 16 --model.n-layers 1 --model.seq-len 32 --model.vocab-size 300 "
    flags += "--training.eval-tokens 300 --training.final-eval-tokens 300 "
    flags += " ".join(f"--phases.{phase}.steps 1" for phase in phases)
    main(parse_run([name, *flags.split()]))
    assert all(Path("run", f"{phase}_final.pt").exists() for phase in phases)


def field_tables() -> str:
    """What a history may hold, in Markdown: a table for each event."""
    tables = [("In every line", "", ALWAYS)]
    tables += [(f"`{event}`", EVENT_TIMES[event], HISTORY_FIELDS[event]) for event in EVENT_TIMES]
    parts = []
    for title, time, fields in tables:
        rows = [("field", "meaning"), *((f"`{name}`", doc) for name, doc in fields.items())]
        table = "\n".join(format_markdown_table(rows))
        parts += [part for part in (f"### {title}", time, table) if part]
    return "\n\n".join(parts)


def test_the_tables_of_the_historys_fields_are_those_that_the_code_declares():
    page = (ROOT / "docs" / "history.md").read_text()
    (tables,) = re.findall(
        r"<!-- fields of the history -->\n\n(.*?)\n*<!-- end of fields -->", page, re.S
    )
    assert HISTORY_FIELDS.keys() == EVENT_TIMES.keys()
    assert tables == field_tables(), f"docs/history.md must say:\n\n{field_tables()}"


def test_links_between_documents_lead_somewhere():
    broken = []
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]*)?\)", path.read_text()):
            if not (path.parent / target).exists():
                broken.append(f"{path.name}: {target}")
    assert not broken


def test_tables_of_runs_are_those_that_their_histories_give():
    """`python -m utils.experiment report docs/FILE` prints what stands between two comments."""
    reports = [
        (page.name, *block)
        for page in (ROOT / "docs").glob("*.md")
        for block in re.findall(
            r"<!-- report of (\S+) -->\n\n(.*?)\n\n<!-- end of report -->", page.read_text(), re.S
        )
    ]
    assert reports
    differing = [
        (page, file) for page, file, text in reports if text != report_of(ROOT / "docs" / file)
    ]
    assert not differing


def test_the_histories_that_are_kept_take_less_than_a_megabyte():
    files = list((ROOT / "docs").rglob("*.jsonl"))
    assert files and sum(file.stat().st_size for file in files) < 2**20


def test_a_kept_history_has_all_step_lines_of_its_run_or_says_how_it_was_thinned():
    for file in (ROOT / "docs").rglob("*.jsonl"):
        for run, *events in split_runs(read_history(file)):
            steps = [event["step"] for event in select_events(events, "step")]
            gaps = {b - a for a, b in pairwise(steps) if b > a}
            assert "thinned" in run or max(gaps) == run["config"]["training"]["log_every"], file
