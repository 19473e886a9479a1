"""What comes from the Hugging Face hub, and what is said when it does not."""

import importlib.util
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from config import InputError

TINYSTORIES = "roneneldan/TinyStories"
GPT2 = "openai-community/gpt2"
REVISIONS = {
    TINYSTORIES: "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
    GPT2: "607a30d783dfa663caf39e06633721c8d4cfcd7e",
}
"""Commits of what runs are compared on; anything else is taken as it is on the day."""
PATIENCE = 8.0
"""Seconds within which the hub must have answered at all."""
WAYS_OUT = (
    "try --data.source builtin, --data.source PATH with a --data.tokenizer of your own, "
    "HF_HUB_OFFLINE=1 with a warm cache, or another HF_ENDPOINT"
)


class Unreachable(InputError):
    """The hub did not deliver, though what was asked for may well be there."""


def texts(name: str, text_field: str) -> dict[str, Callable[[], Iterator[str]]]:
    """The splits of a dataset, each with a way to read its texts from the beginning."""
    if importlib.util.find_spec("datasets") is None:
        raise Unreachable(f"data.source: {name} needs the datasets library (pip install datasets)")
    with delivering(f"data.source: dataset {name}"):
        answers()
        import datasets

        splits = datasets.load_dataset(name, revision=REVISIONS.get(name), streaming=True)
    return {
        str(split): lambda rows=rows: column(name, rows, text_field)
        for split, rows in splits.items()
    }


def column(name: str, rows: Iterable[dict], text_field: str) -> Iterator[str]:
    with delivering(f"data.source: dataset {name}"):
        for row in rows:
            if not isinstance(row.get(text_field), str):
                have = ", ".join(row)
                raise InputError(
                    f"data.text_field = {text_field}: {name} has no such text ({have})"
                )
            yield row[text_field]


def file(repo: str, name: str) -> Path:
    """A file of a model on the hub, from the cache if it is there."""
    import huggingface_hub

    revision = REVISIONS.get(repo)
    cached = huggingface_hub.try_to_load_from_cache(repo, name, revision=revision)
    if isinstance(cached, str):
        return Path(cached)
    with delivering(f"data.tokenizer: {name} of {repo}"):
        answers()
        return Path(huggingface_hub.hf_hub_download(repo, name, revision=revision))


@contextmanager
def delivering(what: str) -> Iterator[None]:
    """Turns what the libraries raise into one line that names the ways out."""
    from huggingface_hub import errors

    http_error = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]  # of its own client
    try:
        yield
    except InputError:
        raise
    except (errors.RepositoryNotFoundError, errors.RemoteEntryNotFoundError) as error:
        raise InputError(f"{what}: not on the hub, or not for you") from error
    except (OSError, http_error) as error:
        raise Unreachable(f"{what} cannot be fetched ({brief(error)}); {WAYS_OUT}") from error
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{what} cannot be read ({brief(error)})") from error


def answers() -> None:
    """Raises OSError unless the hub answers soon; its clients would go on trying for minutes.

    The thread bounds what a timeout does not: name servers, and one address after the other.
    """
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    answer: queue.SimpleQueue[str] = queue.SimpleQueue()

    def ask() -> None:
        try:
            url = f"{constants.ENDPOINT}/api/models/{GPT2}"
            status = huggingface_hub.get_session().get(url, timeout=PATIENCE).status_code
            answer.put(f"it answers {status}" if status >= 500 else "")
        except Exception as error:  # whatever it is, the caller must hear of it
            answer.put(brief(error))

    threading.Thread(target=ask, daemon=True).start()
    try:
        trouble = answer.get(timeout=PATIENCE)
    except queue.Empty:
        trouble = f"no answer in {PATIENCE:.0f} s"
    if trouble:
        raise OSError(f"{constants.ENDPOINT}: {trouble}")


def brief(error: BaseException) -> str:
    """The first line of what it says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
