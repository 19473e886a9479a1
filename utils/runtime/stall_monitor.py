"""How long to wait for the Hugging Face hub: as long as it sends something new.

The hub's clients try a failed request again for minutes. `call_with_timeout` runs a call to them in
a thread and gives it up once nothing new has come for a while; a slow hub is waited for.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from utils.runtime.threads import start_thread, wait_interruptibly

T = TypeVar("T")
PATIENCE_S = 6.0
"""Seconds without anything new from the hub after which it is given up."""
GRACE_S = 3.0
"""Seconds more for its clients to end by themselves."""
RATE_LIMIT = "its rate limit is reached (429), which is higher for who is logged in"
TIMEOUTS = ("connect", "read", "write", "pool")
"""What the clients' HTTP library limits the time of."""


class StallMonitor:
    """Measures how long the hub has sent nothing new, and ends its clients' tries when that is too
    long. What is asked for again is new only as far as there is more of it: a server that breaks
    off at the same byte for ever sends nothing."""

    def __init__(self) -> None:
        self.responses = deque[Any](maxlen=4)  # the one that is being read is among the last
        self.start()

    def start(self) -> None:
        """Starts to measure anew, from now."""
        self.last_new = time.monotonic()
        self.last_failure = ""
        self.received: dict[tuple[str, ...], int] = {}
        """The most bytes that have come in answer to each request."""

    def attach(self) -> None:
        """Sees to it that the clients' session, which is replaced at times, reports to this."""
        from huggingface_hub import get_session

        session = get_session()
        if self.on_request not in session.event_hooks["request"]:
            session.event_hooks["request"].append(self.on_request)
            session.event_hooks["response"].append(self.on_response)

    def on_request(self, request: Any) -> None:
        """Sets a request's timeouts, and raises OSError in place of one that is made again after
        too long a silence. The clients do not try again after that, so that their thread ends: one
        that is still inside Arrow when the process ends would abort it."""
        key = request_key(request)
        if key in self.received and self.silence_s() > PATIENCE_S:
            raise self.make_error()
        self.received.setdefault(key, 0)
        request.extensions["timeout"] = dict.fromkeys(TIMEOUTS, PATIENCE_S)

    def on_response(self, response: Any) -> None:
        """Notes an answer, whose content is still to come."""
        if response.status_code < 400:
            self.responses.append(response)
        elif response.status_code == 429:  # for which the clients may wait long
            self.last_failure = f": {RATE_LIMIT}"
        elif response.status_code >= 500:
            self.last_failure = f", it answered {response.status_code}"

    def silence_s(self) -> float:
        """Returns the seconds since something new came."""
        for response in list(self.responses):
            key = request_key(response.request)
            if response.num_bytes_downloaded > self.received.get(key, 0):
                self.received[key] = response.num_bytes_downloaded
                self.last_new = time.monotonic()
        return time.monotonic() - self.last_new

    def give_up_if_silent(self) -> None:
        """Raises OSError once the hub has sent nothing new for too long."""
        self.attach()
        if self.silence_s() > PATIENCE_S + GRACE_S:
            raise self.make_error()

    def make_error(self) -> OSError:
        """Returns the error that says why the hub was given up."""
        return OSError(f"nothing for {PATIENCE_S:.0f} s{self.last_failure}")


def request_key(request: Any) -> tuple[str, ...]:
    """Returns what two requests for the same bytes have in common: method, path and range. The
    rest of an address may hold a signature, which changes."""
    return request.method, request.url.path, request.headers.get("range", "")


hub_monitor = StallMonitor()
"""The clients' session is the process's, so there is one of these."""


def call_with_timeout(call: Callable[[], T]) -> T:
    """Returns what a call to the hub's clients returns.

    The thread bounds what no timeout of theirs does: name servers, and one address after another.

    Raises:
        OSError: once the hub has sent nothing new for PATIENCE_S + GRACE_S seconds.
    """
    hub_monitor.start()
    hub_monitor.attach()
    result, thread = start_thread(call)
    wait_interruptibly(result, hub_monitor.give_up_if_silent)
    thread.join()  # or it may free what `call` reads from while the process ends, and abort it
    return result.result()
