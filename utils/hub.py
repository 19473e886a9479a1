"""What comes from the Hugging Face hub, and what is said when it does not."""

import hashlib
import importlib.util
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from config import InputError
from utils import traffic
from utils.traffic import soon

TINYSTORIES = "roneneldan/TinyStories"
GPT2 = "openai-community/gpt2"
REVISIONS = {
    TINYSTORIES: "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
    GPT2: "607a30d783dfa663caf39e06633721c8d4cfcd7e",
}
"""Commits of what runs are compared on; anything else is taken as it is on the day."""
ROWS = 64
"""Rows of a dataset that are fetched at a time."""
BLOCK = 1 << 24
OFFLINE = "HF_HUB_OFFLINE=1 with a warm cache, or another HF_ENDPOINT"
WAYS_OUT = (
    "try --data.source builtin, --data.source PATH with a --data.tokenizer of your own, " + OFFLINE
)


class Unreachable(InputError):
    """The hub did not deliver, though what was asked for may well be there."""


class Absent(InputError):
    """The hub says that there is no such thing."""


def texts(name: str, text_field: str) -> dict[str, Callable[[], Iterator[str]]]:
    """The splits of a dataset, each with a way to read its texts from the beginning."""
    if importlib.util.find_spec("datasets") is None:
        raise Unreachable(f"data.source: {name} needs the datasets library (pip install datasets)")
    import datasets
    import pyarrow
    from huggingface_hub import constants

    with delivering(f"data.source: dataset {name}"):
        pyarrow.set_io_thread_count(1)  # reads that fail one by one leave none behind
        constants.HF_HUB_DOWNLOAD_TIMEOUT = traffic.PATIENCE
        answers()
        discard_damaged(name)
        revision = REVISIONS.get(name)
        splits = soon(lambda: datasets.load_dataset(name, revision=revision, streaming=True))
    columns = next(iter(splits.values())).column_names  # or None; its splits have the same
    if columns and text_field not in columns:  # once rows are read, Arrow's threads hold the file:
        raise no_text(name, text_field, columns)  # one that frees it amid the process's end aborts
    read: Counter[str] = Counter()
    return {
        str(split): lambda rows=rows: column(name, rows, text_field, read)
        for split, rows in splits.items()
    }


def column(name: str, rows: Iterable[dict], text_field: str, read: Counter[str]) -> Iterator[str]:
    """`read` counts the texts of all splits; once there are any, failing is no reason to make do
    with others."""
    left = iter(rows)
    try:
        with delivering(f"data.source: dataset {name}"):
            while some := soon(lambda: list(islice(left, ROWS))):
                for row in some:
                    if not isinstance(row.get(text_field), str):
                        raise no_text(name, text_field, row)
                    read[name] += 1
                    yield row[text_field]
    except Unreachable as error:
        if not read[name]:
            raise
        raise InputError(f"{error}; {read[name]:,} texts had come: run again") from error


def no_text(name: str, text_field: str, columns: Iterable[str]) -> InputError:
    have = ", ".join(columns)
    return InputError(f"data.text_field = {text_field}: {name} has no such text ({have})")


def file(repo: str, name: str, what: str = "data.tokenizer", ways_out: str = WAYS_OUT) -> Path:
    """A file of a model on the hub, from the cache if it is there and whole. `what` it is for."""
    import huggingface_hub
    from huggingface_hub import constants

    revision = REVISIONS.get(repo)
    what = f"{what}: {name} of {repo}"
    with delivering(what):
        cached = huggingface_hub.try_to_load_from_cache(repo, name, revision=revision)
    damaged = isinstance(cached, str) and not is_whole(Path(cached))
    if isinstance(cached, str) and not damaged:
        return Path(cached)
    if damaged:
        what = f"{cached} is damaged (delete it); {what}"
    constants.HF_HUB_DISABLE_XET = True  # whose traffic cannot be seen
    constants.HF_HUB_DOWNLOAD_TIMEOUT = traffic.PATIENCE
    with delivering(what, ways_out):
        answers()
        if damaged and constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        return Path(
            soon(
                lambda: huggingface_hub.hf_hub_download(
                    repo, name, revision=revision, force_download=damaged
                )
            )
        )


def discard_damaged(name: str) -> None:
    """What a dataset says of itself is in the cache too, and would be read from there for ever."""
    import huggingface_hub

    for part in ("README.md", "dataset_infos.json"):
        cached = huggingface_hub.try_to_load_from_cache(
            name, part, revision=REVISIONS.get(name), repo_type="dataset"
        )
        if isinstance(cached, str) and not is_whole(Path(cached)):
            Path(cached).resolve().unlink()
            Path(cached).unlink()


def is_whole(path: Path) -> bool:
    """The cache names a file after its hash, git's or another, and links to it."""
    if not path.is_symlink():
        return True
    name = Path(os.readlink(path)).name
    digests = [hashlib.new(how) for how in ("md5", "sha1", "sha256")]
    digests.append(hashlib.sha1(b"blob %d\0" % path.stat().st_size))
    digests = [digest for digest in digests if 2 * digest.digest_size == len(name)]
    with path.open("rb") as file:
        while block := file.read(BLOCK) if digests else b"":
            for digest in digests:
                digest.update(block)
    return not digests or name in [digest.hexdigest() for digest in digests]


@contextmanager
def delivering(what: str, ways_out: str = WAYS_OUT) -> Iterator[None]:
    """Turns what the libraries raise into one line that names the ways out."""
    from huggingface_hub import errors

    http_error = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]  # of its own client
    for library in ("datasets", "huggingface_hub"):  # they tell of every try
        logging.getLogger(library).setLevel(logging.CRITICAL)
    try:
        yield
    except InputError:
        raise
    except (errors.RepositoryNotFoundError, errors.RemoteEntryNotFoundError) as error:
        raise Absent(f"{what}: not on the hub, or not for you") from error
    except (OSError, http_error) as error:
        raise Unreachable(f"{what} cannot be fetched ({brief(error)}); {ways_out}") from error
    except Exception as error:  # what is wrong with a file shows as any error
        raise InputError(f"{what} cannot be read ({brief(error)})") from error


def answers() -> None:
    """Raises OSError unless the hub answers: its clients would go on trying for minutes."""
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    url = f"{constants.ENDPOINT}/api/models/{GPT2}"
    try:
        answer = soon(lambda: huggingface_hub.get_session().get(url, timeout=traffic.PATIENCE))
    except Exception as error:  # whatever it is, there is no answer
        raise OSError(f"{constants.ENDPOINT}: {brief(error)}") from error
    if answer.status_code >= 500:
        raise OSError(f"{constants.ENDPOINT}: it answers {answer.status_code}")


def brief(error: BaseException) -> str:
    """The first line of what it says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
