"""The error that stops a run."""


class RunStopped(RuntimeError):
    """A run cannot go on. The message says where it stood and what is left of it."""
