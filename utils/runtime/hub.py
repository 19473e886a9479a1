"""Files and datasets from the Hugging Face hub, and one clear line when they do not come."""

import hashlib
import importlib.util
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path

from config import InputError
from utils.runtime.records import PEEKED_ROWS, choose_text_field, find_text_field, read_texts
from utils.runtime.stall_monitor import RATE_LIMIT, call_with_timeout

TINYSTORIES = "roneneldan/TinyStories"
GPT2 = "openai-community/gpt2"
HUB_REVISIONS = {
    TINYSTORIES: "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
    GPT2: "607a30d783dfa663caf39e06633721c8d4cfcd7e",
}
"""Commits of what runs are compared on. Anything else is taken as it is on the day."""
ROWS_PER_FETCH = 64
OFFLINE_HINT = "HF_HUB_OFFLINE=1 with a warm cache, or another HF_ENDPOINT"
DATA_HINT = f"try --data.source builtin, --data.source PATH (your own text), {OFFLINE_HINT}"
TOKENIZER_HINT = (
    "try --data.tokenizer learned (a vocabulary of the text's own, no download), the path of a "
    f"tokenizer.json, {OFFLINE_HINT}"
)
LOG_IN = "log in (`hf auth login`, or set HF_TOKEN)"


class HubUnreachable(InputError):
    """The hub did not deliver, though what was asked for may well be there."""


class NotOnHub(InputError):
    """The hub says that a model that is there has no such file."""


def dataset_splits(
    name: str, text_field: str, config: str, null_rows: dict[str, int]
) -> dict[str, Callable[[], Iterator[str]]]:
    """Returns a dataset's splits by name, each as a function that reads its texts from the
    beginning.

    Args:
        name: The dataset.
        text_field: The column of the text; empty takes the one that `choose_text_field` does.
        config: Which of the dataset's configurations; empty takes the default one.
        null_rows: Counts the rows without a text by split. They are left out.

    Raises:
        InputError: for a dataset that is not to be had, cannot be read or has no such column.
        HubUnreachable: if the hub does not deliver it.
    """
    if importlib.util.find_spec("datasets") is None:
        raise HubUnreachable(
            f"data.source: {name} needs the datasets library (pip install datasets)"
        )
    import datasets
    import pyarrow

    with explain_hub_errors(f"data.source: dataset {name}"):
        pyarrow.set_io_thread_count(1)  # reads that fail one by one leave none behind
        check_hub_answers()
        remove_damaged_cards(name)
        revision = HUB_REVISIONS.get(name)
        splits = call_with_timeout(
            lambda: datasets.load_dataset(name, config or None, revision=revision, streaming=True)
        )
    features = next(iter(splits.values())).features  # of all splits; None if not known
    # Before a row is read: Arrow's threads then hold the file, and may abort the process's end.
    if features:
        is_text = ("string", "large_string")
        texts = [f for f, value in features.items() if getattr(value, "dtype", "") in is_text]
        text_field = choose_text_field(text_field, features, texts, f"dataset {name}")
    num_read: Counter[str] = Counter()

    def read_split(split: str, rows: Iterable[dict]) -> Iterator[str]:
        unread = fetch_rows(name, rows, num_read)
        peeked = [] if features else list(islice(unread, PEEKED_ROWS))
        field = text_field if features else find_text_field(text_field, peeked, f"dataset {name}")
        return read_texts(chain(peeked, unread), field, split, null_rows)

    return {
        str(split): lambda split=split, rows=rows: read_split(str(split), rows)
        for split, rows in splits.items()
    }


def fetch_rows(name: str, rows: Iterable[dict], num_read: Counter[str]) -> Iterator[dict]:
    """Yields the rows of a split. `num_read` counts those of all splits: once some have come, a hub
    that fails is no longer HubUnreachable, for which others would be taken."""
    unread = iter(rows)
    try:
        with explain_hub_errors(f"data.source: dataset {name}"):
            while fetched := call_with_timeout(lambda: list(islice(unread, ROWS_PER_FETCH))):
                for row in fetched:
                    num_read[name] += 1
                    yield row
    except HubUnreachable as error:
        if not num_read[name]:
            raise
        raise InputError(f"{error}; {num_read[name]:,} texts had come: run again") from error


def fetch_hub_file(
    repo: str, name: str, field: str = "data.tokenizer", hint: str = TOKENIZER_HINT
) -> Path:
    """Returns the path of a file of a model on the hub, from the clients' cache if it is there and
    intact.

    Args:
        repo: The model.
        name: The file.
        field: What it is for, with which an error begins.
        hint: What to try if it does not come, with which an error ends.

    Raises:
        NotOnHub: if the model has no such file.
        InputError: if the hub shows this user no such model.
        HubUnreachable: if the hub does not deliver it.
    """
    import huggingface_hub
    from huggingface_hub import constants

    revision = HUB_REVISIONS.get(repo)
    subject = f"{field}: {name} of {repo}"
    with explain_hub_errors(subject):
        cached = huggingface_hub.try_to_load_from_cache(repo, name, revision=revision)
    damaged = isinstance(cached, str) and not is_intact(Path(cached))
    if isinstance(cached, str) and not damaged:
        return Path(cached)
    if cached is not None and not damaged:  # the cache remembers that the hub has no such file
        raise NotOnHub(f"{subject}: not on the hub")
    if damaged:
        subject = f"{cached} is damaged (delete it); {subject}"
    constants.HF_HUB_DISABLE_XET = True  # what comes through it cannot be seen
    with explain_hub_errors(subject, hint):
        check_hub_answers()
        if damaged and constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        path = call_with_timeout(
            lambda: huggingface_hub.hf_hub_download(
                repo, name, revision=revision, force_download=damaged
            )
        )
    return Path(path)


def fetch_optional_hub_file(
    repo: str, name: str, field: str = "data.tokenizer", hint: str = TOKENIZER_HINT
) -> Path | None:
    """Returns the path of a file of a model on the hub, as `fetch_hub_file` does; None where it has
    no such file or, with HF_HUB_OFFLINE, the cache has none."""
    from huggingface_hub import constants

    try:
        return fetch_hub_file(repo, name, field, hint)
    except NotOnHub:
        return None
    except HubUnreachable:
        if constants.HF_HUB_OFFLINE:
            return None
        raise


def remove_damaged_cards(name: str) -> None:
    """Removes what a dataset says about itself from the clients' cache if it is damaged; they would
    read it from there for ever."""
    import huggingface_hub

    for card in ("README.md", "dataset_infos.json"):
        cached = huggingface_hub.try_to_load_from_cache(
            name, card, revision=HUB_REVISIONS.get(name), repo_type="dataset"
        )
        if isinstance(cached, str) and not is_intact(Path(cached)):
            Path(cached).resolve().unlink()
            Path(cached).unlink()


def is_intact(path: Path) -> bool:
    """Whether a file of the clients' cache has the hash that it is named after, git's or another.
    It is taken to be intact where its name is no hash."""
    if not path.is_symlink():
        return True
    name, git_header = Path(os.readlink(path)).name, b"blob %d\0" % path.stat().st_size
    algorithms = {32: ["md5"], 40: ["sha1", lambda: hashlib.sha1(git_header)], 64: ["sha256"]}
    hashes = [hash_file(path, algorithm) for algorithm in algorithms.get(len(name), [])]
    return not hashes or name in hashes


def hash_file(path: Path, algorithm: str | Callable = "sha256") -> str:
    """Returns the hexadecimal hash of a file's content. `algorithm` is a name that hashlib knows,
    or a function that makes a hash."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


@contextmanager
def explain_hub_errors(subject: str, hint: str = DATA_HINT) -> Iterator[None]:
    """Turns what the clients raise into one line: what could not be had, why, and what to try."""
    from huggingface_hub import errors

    http_error = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]  # of its own client
    for library in ("datasets", "huggingface_hub"):  # they tell of every try
        logging.getLogger(library).setLevel(logging.CRITICAL)
    try:
        yield
    except InputError:
        raise
    except errors.RemoteEntryNotFoundError as error:
        raise NotOnHub(f"{subject}: there is no such file") from error
    except (OSError, http_error) as error:
        if reason := access_error(error):
            raise InputError(f"{subject}: {reason}") from error
        reason = RATE_LIMIT if status_of(error) == 429 else first_line(error)
        raise HubUnreachable(f"{subject} cannot be fetched ({reason}); {hint}") from error
    except Exception as error:  # what is wrong with a file shows as any error
        if listed := re.search(r"vailable(?: configs)?: \[(.*)\]", str(error)):
            raise InputError(f"{subject}: --data.config takes one of {listed[1]}") from error
        raise InputError(f"{subject} cannot be read ({first_line(error)})") from error


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error, the one that it came from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def status_of(error: BaseException) -> int:
    """Returns the status of the answer that an error came from; 0 if there was none."""
    answers = (getattr(cause, "response", None) for cause in causes_of(error))
    return next((answer.status_code for answer in answers if answer is not None), 0)


def access_error(error: BaseException) -> str:
    """Returns why the hub does not let this user have something, and what to do, as a phrase; empty
    for another error. To who may not see a repository, the hub does not tell whether there is one.
    """
    from huggingface_hub import errors

    kinds = {kind.__name__ for cause in causes_of(error) for kind in type(cause).__mro__}
    # The datasets library says what it was told only in words.
    if errors.GatedRepoError.__name__ in kinds or "is a gated dataset" in str(error):
        return f"it is gated: accept its conditions on its page of the hub, then {LOG_IN}"
    is_hidden = kinds & {errors.RepositoryNotFoundError.__name__, "DatasetNotFoundError"}
    if is_hidden or status_of(error) == 401:
        return f"the hub shows you none of that name: check it or, if it is private, {LOG_IN}"
    if status_of(error) == 403:
        return f"the hub does not let you have it (403): {LOG_IN} as somebody who may"
    return ""


def check_hub_answers() -> None:
    """Raises OSError unless the hub answers. Its clients would go on trying for minutes."""
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    url = f"{constants.ENDPOINT}/api/models/{GPT2}"
    try:
        answer = call_with_timeout(lambda: huggingface_hub.get_session().get(url))
    except Exception as error:  # whatever it is, there is no answer
        raise OSError(f"{constants.ENDPOINT}: {first_line(error)}") from error
    if answer.status_code == 429:
        raise OSError(f"{constants.ENDPOINT}: {RATE_LIMIT}")
    if answer.status_code >= 500:
        raise OSError(f"{constants.ENDPOINT}: it answers {answer.status_code}")


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the error's class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
