"""Running the jobs of a sweep as a Slurm job array, through submitit (an optional package).

Slurm sends a user signal to a task that it preempts or whose time is up. submitit answers it by
calling `checkpoint` and queueing the task again, and the run resumes from its own latest.pt.
"""

import contextlib
import os
import shlex
import signal
import time
from collections.abc import Iterable
from pathlib import Path

from common.errors import EXIT_BUSY, EXIT_PREEMPTED, EXIT_USAGE, UserError
from common.files import ROOT
from common.optional import import_optional
from sweeps.launching import Job, last_output, start_process

BUSY_POLL = 60.0  # seconds between looks at a job that another process runs
LAST_WAIT = 900.0  # seconds that Slurm takes to kill a task after SIGTERM
ANY_NUMBER = 10**6  # of times that a task may reach its time limit and be queued again


class SlurmTask:
    """A task of the array: one job's train.py, whose output is appended to its output.log."""

    def __init__(self, job: Job, environment: dict[str, str]):
        self.job, self.environment = job, environment
        self.child = None

    def __call__(self) -> None:
        """Run until the job is finished. Raises UserError if it failed twice, or on bad input."""
        while True:
            self.child = start_process(self.job, self.environment)
            code = self.child.wait()
            self.child = None
            if code == 0:
                return
            if code == EXIT_BUSY:
                time.sleep(BUSY_POLL)
            elif code == EXIT_PREEMPTED:
                # The run was signalled, and so is this task: `checkpoint` is about to be called.
                # Or it was SIGTERM, which Slurm sends before it kills: a task that ended by itself
                # now would count as failed, and Slurm would not queue it again.
                time.sleep(LAST_WAIT)
            elif self.job.failures or code == EXIT_USAGE:
                raise UserError(
                    f"{self.job.name} failed with exit code {code}; its output ends "
                    f"with\n{last_output(self.job.folder)}"
                )
            else:
                self.job.failures += 1

    def checkpoint(self):
        """Called by submitit in a signal handler: let the run save, and return what to queue."""
        from submitit.helpers import DelayedSubmission

        child = self.child
        if child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGTERM)
            # not child.wait(): the signal may have interrupted it, and its lock is not reentrant
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        fresh = Job(self.job.folder, self.job.command)
        return DelayedSubmission(SlurmTask(fresh, self.environment))


def submit(
    jobs: Iterable[Job],
    logs: Path,
    *,
    minutes: int,
    partition: str | None,
    gpus: int,
    cpus: int,
    max_parallel: int,
) -> str:
    """Queue the jobs as one job array and return its number.

    Args:
        logs: folder of Slurm's and submitit's own files.
        minutes: time limit of a task, after which it is queued again.
        gpus, cpus: what each task gets, on one machine.
        max_parallel: largest number of tasks at a time.

    Raises UserError if submitit or Slurm is not installed, or if Slurm refuses.
    """
    submitit = import_optional("submitit", purpose="--launcher slurm")
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
            array_parallelism=max_parallel,
            stderr_to_stdout=True,
            signal_delay_s=300,  # before the time limit: an evaluation may have to end first
            setup=[f'export PYTHONPATH={path}"${{PYTHONPATH:+:$PYTHONPATH}}"'],
            additional_parameters={"requeue": True},
        )
        with executor.batch():
            threads = {"OMP_NUM_THREADS": str(cpus)}
            jobs = [executor.submit(SlurmTask(job, threads)) for job in jobs]
    except (RuntimeError, OSError) as error:
        raise UserError(f"--launcher slurm: {error}") from error
    return jobs[0].job_id.partition("_")[0]
