"""Rows of a table or of JSON: which of their fields holds the text, and the texts in it."""

from collections.abc import Collection, Iterable, Iterator
from itertools import islice

from config import InputError, require

PEEKED_ROWS = 64
"""Rows to judge by which fields there are, where no schema says it."""


class NoTextField(InputError):
    """It cannot be told which field holds the text."""


def choose_text_field(
    wanted: str, fields: Collection[str], text_fields: Collection[str], where: str
) -> str:
    """Returns the field that holds the text: the one that is wanted, else `text`, else the only one
    that holds text.

    Args:
        wanted: The field that the user names; empty leaves it to this function.
        fields: All that there are.
        text_fields: Those of them that hold text.
        where: What they are the fields of, for the error.

    Raises:
        NoTextField: if the wanted one is not there, or none or several could be meant.
    """
    listed = ", ".join(fields) or "none"
    if wanted:
        if wanted not in fields:
            raise NoTextField(f"data.text_field = {wanted}: {where} has no such field ({listed})")
        return wanted
    if "text" in fields:
        return "text"
    if len(text_fields) == 1:
        return next(iter(text_fields))
    many = "several fields" if text_fields else "no field"
    raise NoTextField(
        f"data.source: {where} has {many} of text ({', '.join(text_fields) or listed}); "
        "--data.text-field NAME chooses one"
    )


def find_text_field(wanted: str, rows: Iterable[object], where: str) -> str:
    """Returns the field of the text in JSON rows, judged by the first of them; empty where they are
    texts themselves. See `choose_text_field`."""
    peeked = list(islice(rows, PEEKED_ROWS))
    items = [item for row in peeked if isinstance(row, dict) for item in row.items()]
    if not items and any(isinstance(row, str) for row in peeked):
        return ""
    text_fields = dict.fromkeys(name for name, value in items if isinstance(value, str))
    return choose_text_field(wanted, dict.fromkeys(name for name, _ in items), text_fields, where)


def read_texts(
    rows: Iterable[object], field: str, where: str, null_rows: dict[str, int]
) -> Iterator[str]:
    """Yields the text of each row, which is in its `field`, or the row itself if it is a text. Rows
    that have none, or null in its place, are left out, and counted in `null_rows[where]`.

    Raises:
        InputError: for a row with something else in its place.
    """
    null_rows[where] = 0
    for number, row in enumerate(rows, start=1):
        text = row.get(field) if isinstance(row, dict) else row
        if text is None:
            null_rows[where] += 1
            continue
        require(
            isinstance(text, str), f"data.source: {where}, row {number}: {text!r:.40} is no text"
        )
        # JSON may hold halves of characters, which are none.
        yield str(text).encode("utf-8", "replace").decode()
