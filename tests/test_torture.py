"""tools/torture.py: a few kills of a real pretraining on two processes."""

import subprocess
import sys
from pathlib import Path


def test_nothing_is_lost_over_a_few_kills():
    done = subprocess.run([sys.executable, "-m", "tools.torture", "--kills", "5"],
                          cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    table = dict(line.rsplit(maxsplit=1) for line in done.stdout.split("\r")[-1].splitlines())
    assert int(table["steps lost"]) == 0
    assert table["weights, bit for bit"] == table["log, but for timings"] == "equal"
    assert int(table["kills"]) >= 5 and int(table["resumes"]) >= 1
