"""Stop requests: signals that ask a run to save and leave, and the death of its launcher."""

import os
import signal
import threading
import time

from common.cli import ignore_closed_output
from common.processes import STOP_SIGNALS, read_integer

ORPHAN_GRACE = 10.0  # seconds that a process without its launcher has for saving


class StopRequest:
    """`requested` becomes True when a stop signal arrives or the launcher of this process dies.

    A launcher is torchrun, or the process whose id is in TWISTNET_LAUNCHER. A shell is not one: a
    run that was started with nohup outlives it, and ignores its SIGHUP.
    """

    def __init__(self):
        self.reason = ""
        ignore_closed_output()  # Ctrl-C also ends the tee that our output goes to
        under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        for number in STOP_SIGNALS:
            # torchrun passes SIGHUP on to its ranks even when it was itself started with nohup.
            inherited = signal.getsignal(number) == signal.SIG_IGN
            if not (number == signal.SIGHUP and inherited and not under_torchrun):
                signal.signal(number, self._handle)
        launcher = read_integer("TWISTNET_LAUNCHER", 0)
        if launcher == os.getppid() or under_torchrun:
            threading.Thread(target=self._watch, args=(os.getppid(),), daemon=True).start()
        elif launcher and not _is_alive(launcher):
            self.reason = "the death of its launcher"  # while this process was still importing

    @property
    def requested(self) -> bool:
        return bool(self.reason)

    def _handle(self, number, frame):
        self.reason = signal.Signals(number).name

    def _watch(self, launcher: int):
        while os.getppid() == launcher:
            time.sleep(0.5)
        self.reason = "the death of its launcher"
        # The other ranks may be dead, and a collective would wait for them for half an hour.
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
