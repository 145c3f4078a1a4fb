"""Run a function on many tasks in several processes, which end when the main process does."""

import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import connection, parent_process

from tqdm import tqdm


def map_in_processes(
    function: Callable,
    tasks: Sequence,
    *,
    workers: int,
    desc: str,
    unit: str = "class",
    size: Callable[[object], int] = lambda task: 1,
) -> list:
    """Results of `function` for every task, in order; a task counts `size` in the progress bar."""
    if not tasks:
        return []
    results = []
    with (
        ProcessPoolExecutor(min(workers, len(tasks)), initializer=_follow_parent) as pool,
        tqdm(total=sum(map(size, tasks)), desc=desc, unit=unit) as bar,
    ):
        try:
            for task, result in zip(tasks, pool.map(function, tasks), strict=True):
                results.append(result)
                bar.update(size(task))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results


def _follow_parent() -> None:
    # The parent handles Ctrl-C. When the parent is killed, its workers must not keep writing into
    # a tree that the next run is working on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait() -> None:
        connection.wait([parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
