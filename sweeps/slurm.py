"""Running the cells of a sweep as a Slurm job array, through submitit (an optional package).

Slurm sends a job that it preempts, or whose time is up, a user signal, which submitit answers by
calling `checkpoint` and queueing the job again. The run then goes on from its own latest.pt.
"""

import contextlib
import os
import shlex
import signal
import time
from collections.abc import Iterable
from pathlib import Path

from common.errors import EXIT_BUSY, EXIT_PREEMPTED, EXIT_USAGE, UserError
from sweeps.launching import Cell, start_process, tail

ROOT = Path(__file__).resolve().parent.parent
BUSY_POLL = 60.0  # seconds between looks at a cell that another process runs
LAST_WAIT = 900.0  # seconds in which whoever sent SIGTERM to a job ends it
ANY_NUMBER = 10**6  # of times that a job may run into its time limit and go on


class CellJob:
    """What a job runs: one cell's train.py, whose output goes to its output.log as ever."""

    def __init__(self, cell: Cell, environment: dict[str, str]):
        self.cell, self.environment = cell, environment
        self.child = None

    def __call__(self) -> None:
        """Run until the cell is finished. UserError where it failed twice, or can never run."""
        while True:
            self.child = start_process(self.cell, self.environment)
            code = self.child.wait()
            self.child = None
            if code == 0:
                return
            if code == EXIT_BUSY:
                time.sleep(BUSY_POLL)
            elif code == EXIT_PREEMPTED:
                # It was signalled, and so are we: `checkpoint` is about to be called. Or it was
                # SIGTERM, which Slurm sends before it kills: a job that ended by itself now would
                # count as failed, and Slurm would not queue it again.
                time.sleep(LAST_WAIT)
            elif self.cell.failures or code == EXIT_USAGE:
                raise UserError(
                    f"{self.cell.name} failed with exit code {code}; its output ends "
                    f"with\n{tail(self.cell.folder)}"
                )
            else:
                self.cell.failures += 1

    def checkpoint(self):
        """Called by submitit in a signal handler: have the run save, and give back what to queue.

        Not `child.wait()`: that may be what the signal interrupted, and its lock is not reentrant.
        """
        from submitit.helpers import DelayedSubmission

        child = self.child
        if child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGTERM)
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        fresh = Cell(self.cell.folder, self.cell.command)
        return DelayedSubmission(CellJob(fresh, self.environment))


def submit(
    cells: Iterable[Cell],
    logs: Path,
    *,
    minutes: int,
    partition: str | None,
    gpus: int,
    cpus: int,
    at_once: int | None,
) -> str:
    """Queue the cells as one job array and give back its number; its files go to `logs`.

    Each task gets `gpus` and `cpus` of one machine for `minutes`, after which it is queued again;
    at most `at_once` run at a time. UserError where there is no submitit, no Slurm, or a refusal.
    """
    try:
        import submitit
    except ImportError as error:
        raise UserError("--launcher slurm needs submitit: pip install submitit") from error
    path = shlex.quote(str(ROOT))
    try:
        executor = submitit.SlurmExecutor(logs, max_num_timeout=ANY_NUMBER)
        executor.update_parameters(
            job_name="sweep",
            time=minutes,
            partition=partition,
            gpus_per_node=gpus or None,
            cpus_per_task=cpus,
            srun_args=["--cpus-per-task", str(cpus)],  # which srun no longer takes from sbatch
            array_parallelism=at_once or 256,
            stderr_to_stdout=True,
            setup=[f'export PYTHONPATH={path}"${{PYTHONPATH:+:$PYTHONPATH}}"'],
            additional_parameters={"requeue": True},
        )
        with executor.batch():
            threads = {"OMP_NUM_THREADS": str(cpus)}
            jobs = [executor.submit(CellJob(cell, threads)) for cell in cells]
    except (RuntimeError, OSError) as error:
        raise UserError(f"--launcher slurm: {error}") from error
    return jobs[0].job_id.partition("_")[0]
