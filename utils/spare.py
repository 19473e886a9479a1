"""What a run can do without."""

from collections.abc import Callable
from typing import Generic, ParamSpec

P = ParamSpec("P")


class Spare(Generic[P]):
    """A call that never fails its caller: the first time that it would, it says so, and from then
    on it does nothing."""

    def __init__(self, what: str, call: Callable[P, object], say: Callable[[str], None]):
        self.what, self.call, self.say = what, call, say
        self.broken = False

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> None:
        if self.broken:
            return
        try:
            self.call(*args, **kwargs)
        except Exception as error:  # whatever another's program or a full disk comes up with
            self.broken = True
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self.say(f"warning: {self.what} failed ({reason}); the run goes on without it")
