"""Runs optional work (plots, trackers) so that a failure warns once instead of stopping
training."""

from collections.abc import Callable
from typing import Generic, ParamSpec

P = ParamSpec("P")


class BestEffort(Generic[P]):
    """A call that never fails its caller: the first time that it would, it warns, and from then on
    it does nothing."""

    def __init__(self, name: str, call: Callable[P, object], warn: Callable[[str], None]):
        self.name, self.call, self.warn = name, call, warn
        self.has_failed = False

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> None:
        if self.has_failed:
            return
        try:
            self.call(*args, **kwargs)
        except Exception as error:  # whatever another's program or a full disk comes up with
            self.has_failed = True
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self.warn(f"warning: {self.name} failed ({reason}); the run goes on without it")
