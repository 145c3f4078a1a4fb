"""How it is trained: steps, schedules, processes, checkpoints and the record of a run."""


class RunError(ValueError):
    """A run that cannot be started or continued as asked; one line that says what to do."""


class BusyError(RunError):
    """A folder that another live process works in."""
