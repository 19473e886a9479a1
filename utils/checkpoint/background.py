"""Writes files beside the training, in one thread, one after the other."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager

import torch
from torch import Tensor

from transfer import TrainState
from utils.runtime.device import to_cpu
from utils.runtime.threads import start_thread, wait_interruptibly


class BackgroundWriter:
    """Carries out writes in a thread, at most one at a time. An error of a write is raised by the
    next call, whichever it is, in the caller's thread."""

    def __init__(self, in_place: bool = False, trains_on_cpu: bool = True):
        """`in_place` carries every write out at once, so that no copy is needed. `trains_on_cpu`
        says that the tensors to be written are those that training goes on to change."""
        self.in_place = in_place
        self.host_copy = torch.clone if trains_on_cpu and not in_place else to_cpu
        self.in_flight: Future[object] | None = None

    def copy(self, state: TrainState) -> TrainState:
        """Returns a state in the host's memory that stays as it is until it is written. Waits for
        the write in flight, so that there is one copy at a time."""
        self.wait()

        def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: self.host_copy(tensor) for name, tensor in tensors.items()}

        adam = {name: copies(moments) for name, moments in state.adam.items()}
        return TrainState(state.config, copies(state.weights), adam)

    def submit(self, write: Callable[[], object]) -> None:
        """Begins a write, once the one in flight is done.

        Raises:
            Exception: what stopped the write before, or this one where it is made in place.
        """
        self.wait()
        if self.in_place:
            write()
        else:
            self.in_flight, _ = start_thread(write)

    def check(self) -> None:
        """Raises what has stopped a write; does not wait for one."""
        if self.in_flight and self.in_flight.done():
            self.wait()

    def wait(self) -> None:
        """Returns once nothing is in flight. Raises what stopped the write."""
        if self.in_flight is None:
            return
        wait_interruptibly(self.in_flight)
        done, self.in_flight = self.in_flight, None
        done.result()

    @contextmanager
    def finished(self) -> Iterator[None]:
        """Waits in the end for what is in flight, also where an error or a signal ends it."""
        try:
            yield
        finally:
            self.wait()
