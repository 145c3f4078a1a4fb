"""Signals that ask a run to save and leave, and parents that are gone."""

import os
import signal
import threading
import time

from common.processes import STOP_SIGNALS

ORPHAN_GRACE = 10.0  # seconds that an orphaned process has for saving before it is ended


class StopRequest:
    """True once a stop signal came, or once the launcher that started this process has died.

    A launcher is torchrun, or whoever set TWISTNET_LAUNCHER to its process id. A shell is none: a
    run started with nohup outlives it.
    """

    def __init__(self):
        self.reason = ""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)
        launcher = int(os.environ.get("TWISTNET_LAUNCHER", 0))
        if launcher == os.getppid() or "TORCHELASTIC_RUN_ID" in os.environ:
            threading.Thread(target=self._watch, args=(os.getppid(),), daemon=True).start()
        elif launcher and not _is_alive(launcher):
            self.reason = "its launcher died"  # while this process was still importing

    def __bool__(self) -> bool:
        return bool(self.reason)

    def _handle(self, number, frame):
        self.reason = signal.Signals(number).name

    def _watch(self, launcher: int):
        while os.getppid() == launcher:
            time.sleep(0.5)
        self.reason = "its launcher died"
        # The other ranks may be gone, and a collective would then wait for them for half an hour.
        time.sleep(ORPHAN_GRACE)
        os._exit(1)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
