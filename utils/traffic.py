"""How long to wait for the Hugging Face hub: as long as it sends something."""

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from huggingface_hub.errors import Response  # pyright: ignore[reportPrivateImportUsage]

T = TypeVar("T")
PATIENCE = 6.0
"""Seconds without a byte after which the hub is given up."""
GRACE = 3.0
"""Seconds more for its clients to end by themselves."""


class Request(Protocol):
    """Of the clients' own library."""

    method: str
    url: object
    headers: Mapping[str, str]


def soon(call: Callable[[], T]) -> T:
    """What `call` returns. Raises OSError once the hub has sent nothing for PATIENCE seconds.

    The thread bounds what no timeout does: name servers, one address after the other.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except Exception as error:  # for the caller
            result.set_exception(error)

    traffic.start()
    traffic.listen()
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while not wait([result], 0.1).done:
        if traffic.silence() > PATIENCE + GRACE:
            raise traffic.complaint()
    thread.join()  # or it may free what `call` reads from amid the process's end, and abort it
    return result.result()


class Traffic:
    """When the hub last sent something, be it slow. What is asked for again counts only as far as
    there is more of it: a server that breaks off at the same place for ever sends nothing."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.start()

    def start(self) -> None:
        self.last = time.monotonic()
        self.trouble = ""
        self.responses: list[Response] = []
        self.sizes: dict[tuple[str, str | None], int] = {}
        self.asked: set[tuple[str, str, str | None]] = set()

    def listen(self) -> None:
        from huggingface_hub import get_session

        session = get_session()
        if self.note not in session.event_hooks["response"]:  # it is a new one at times
            session.event_hooks["response"].append(self.note)
            session.event_hooks["request"].append(self.refuse)
            session.timeout = PATIENCE

    def refuse(self, request: Request) -> None:
        """Ends the clients' tries: a thread that still made them would abort the process's end."""
        again = request.method, str(request.url), request.headers.get("range")
        if again in self.asked and self.silence() > PATIENCE:
            raise self.complaint()
        self.asked.add(again)

    def complaint(self) -> OSError:
        return OSError(f"nothing for {PATIENCE:.0f} s{self.trouble}")

    def note(self, response: "Response") -> None:
        if response.status_code < 400:
            with self.lock:
                self.responses.append(response)
        elif response.status_code >= 500:
            self.trouble = f", it answered {response.status_code}"

    def silence(self) -> float:
        """In seconds."""
        self.listen()
        with self.lock:
            for response in self.responses:
                key = response.url.path, response.request.headers.get("range")
                if response.num_bytes_downloaded > self.sizes.get(key, 0):
                    self.sizes[key] = response.num_bytes_downloaded
                    self.last = time.monotonic()
            self.responses = [response for response in self.responses if not response.is_closed]
        return time.monotonic() - self.last


traffic = Traffic()
"""The session with the hub is the process's, so there is one of these."""
