"""The errors that stop a run."""


class RunStopped(RuntimeError):
    """A run cannot go on. The message says where it stood and what is left of it."""


class NotFinite(RunStopped):
    """A loss or a weight is no longer a number, or infinite."""

    def __init__(self, what: str, advice: str = ""):
        """`advice` says what to change before the run goes on."""
        super().__init__(f"{what}; {advice}" if advice else what)
        self.has_advice = bool(advice)
