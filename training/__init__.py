"""How it is trained: steps, schedules, processes, checkpoints and the record of a run."""
