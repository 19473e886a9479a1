"""The errors that stop a run."""


class RunStopped(RuntimeError):
    """A run cannot go on. The message says where it stood and what is left of it."""


class NotFinite(RunStopped):
    """A loss or a weight is no longer a number, or infinite."""
