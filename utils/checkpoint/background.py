"""Writes files beside the training, in one thread, one after the other."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from transfer import TrainState
from utils.runtime.atomic_io import written_bytes
from utils.runtime.device import to_cpu
from utils.runtime.errors import RunStopped
from utils.runtime.signals import Stopped, defer_signals
from utils.runtime.stopwatch import Stopwatch
from utils.runtime.threads import start_thread, wait_interruptibly

BAR_DELAY_S = 0.5
"""Seconds of waiting after which a bar is shown."""


class BackgroundWriter:
    """Carries out writes in a thread, at most one at a time. An error of a write is raised by the
    next call, whichever it is, in the caller's thread."""

    def __init__(
        self,
        in_place: bool = False,
        trains_on_cpu: bool = True,
        stopwatch: Stopwatch | None = None,
    ):
        """`in_place` carries every write out at once, so that no copy is needed. `trains_on_cpu`
        says that the tensors to be written are those that training goes on to change. `stopwatch`
        counts the time for which training waits."""
        self.in_place, self.stopwatch = in_place, stopwatch or Stopwatch()
        self.host_copy = torch.clone if trains_on_cpu and not in_place else to_cpu
        self.in_flight: Future[object] | None = None
        self.files: Mapping[Path, int] = {}
        """The files of the write in flight, and about how many bytes each will have."""

    def copy(self, state: TrainState) -> TrainState:
        """Returns a state in the host's memory that stays as it is until it is written. Waits for
        the write in flight, so that there is one copy at a time."""
        self.wait()

        def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: self.host_copy(tensor) for name, tensor in tensors.items()}

        with self.stopwatch.counting("saving"):
            adam = {name: copies(moments) for name, moments in state.adam.items()}
            return TrainState(state.config, copies(state.weights), adam)

    def submit(self, write: Callable[[], object], files: Mapping[Path, int]) -> None:
        """Begins a write, once the one in flight is done. One that is made in place is made wholly
        before a signal stops the run.

        Args:
            write: What writes.
            files: The files that it writes, and about how many bytes each will have.

        Raises:
            Exception: what stopped the write before, or this one where it is made in place.
        """
        self.wait()
        with defer_signals():  # or a thread would be on its way that nobody waits for
            if self.in_place:
                with self.stopwatch.counting("saving"):
                    write()
            else:
                self.in_flight, _ = start_thread(write)
                self.files = files

    def check(self) -> None:
        """Raises what has stopped a write; does not wait for one."""
        if self.in_flight and self.in_flight.done():
            self.wait()

    def wait(self) -> None:
        """Returns once nothing is in flight; a wait that takes long shows a bar with bytes. Raises
        what stopped the write."""
        if self.in_flight is None:
            return
        with self.stopwatch.counting("waiting"), self.make_bar() as bar:
            wait_interruptibly(self.in_flight, lambda: bar.update(self.written_bytes() - bar.n))
        with defer_signals():  # or one might come between the two, and the error would be lost
            done, self.in_flight = self.in_flight, None
            done.result()

    def make_bar(self) -> tqdm:
        """Returns the progress bar of what is in flight."""
        return tqdm(
            desc=f"writing {', '.join(path.name for path in self.files)}",
            total=sum(self.files.values()),
            unit="B",
            unit_scale=True,
            delay=BAR_DELAY_S,
            leave=False,
            dynamic_ncols=True,
            disable=None,
        )

    def written_bytes(self) -> int:
        """Returns how much of what is in flight is written."""
        return sum(min(size, written_bytes(path)) for path, size in self.files.items())

    @contextmanager
    def finished(self) -> Iterator[None]:
        """Waits in the end for what is in flight, also where an error or a signal ends it, and
        whatever signal comes then.

        Raises:
            Exception: what stopped the last write; where the disk did and something else has
                stopped the run, the latter, which then tells of both.
        """
        try:
            yield
            self.wait()
        except BaseException as stop:
            try:
                with suppress(Stopped), defer_signals():
                    self.wait()
            except OSError as error:
                if isinstance(stop, RunStopped):
                    raise type(stop)(f"{stop}; {error}") from error
                raise
            raise
