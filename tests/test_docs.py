"""The documentation says what the code says."""

import ast
import re
from itertools import pairwise
from pathlib import Path

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


def test_links_between_documents_lead_somewhere():
    broken = []
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]*)?\)", path.read_text()):
            if not (path.parent / target).exists():
                broken.append(f"{path.name}: {target}")
    assert not broken
