"""One thread a process: the tests' networks are small, and several run at a time."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
