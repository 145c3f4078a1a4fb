"""Kill a real pretraining again and again, and check that nothing is lost.

  python tests/torture.py --kills 50

Pretrains on synthetic textures under torchrun with two processes: once undisturbed, and once
killed (kill -9) or signalled at random moments: a rank or torchrun itself, sometimes after tearing
latest.pt as a power cut would. torchrun restarts the ranks if one was killed, and this script
restarts torchrun. At the end both runs must have the same weights, bit for bit, and the same log
but for its timings.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.cli import Parser, at_least, run  # noqa: E402 (found through the line above)
from common.errors import UserError  # noqa: E402
from common.files import is_locked  # noqa: E402
from data.synthetic import write_imagenet_tree  # noqa: E402
from training.checkpoint import LATEST, PREVIOUS  # noqa: E402

TIMINGS = ("images_per_s", "data_wait", "seconds")  # entries of the log that depend on the clock
STARTED = "start"  # what rank 0 records when it starts; then the number of each step it has done
FAULTS = (
    (LATEST, signal.SIGKILL),  # torn as by a power cut, and then torchrun is killed
    ("torchrun", signal.SIGKILL),
    ("torchrun", signal.SIGTERM),
    ("torchrun", signal.SIGINT),
    ("torchrun", signal.SIGHUP),
    ("rank", signal.SIGKILL),
    ("rank", signal.SIGTERM),
    ("rank", signal.SIGUSR1),
)


@dataclass
class Tally:
    """Faults injected so far, by kind, and how many there are to be."""

    wanted: int
    faults: Counter = field(default_factory=Counter)


# ---------------------------------------------------------------- one rank


def pretrain_and_record(record: str, arguments: list[str]) -> None:
    """Run pretrain_imagenet.py as a rank of torchrun; rank 0 records each step that it has done.

    Trainer.step is wrapped here, and nowhere else, because the record must be on disk as soon as
    the step is done: a log that is written once per epoch would not show which steps are repeated.
    """
    import pretrain_imagenet
    from training.engine import Trainer

    if os.environ["RANK"] == "0":
        file = os.open(record, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, f"{STARTED}\n".encode())
        original = Trainer.step

        def step_and_record(self, batches, *, step: int, lr: float) -> None:
            original(self, batches, step=step, lr=lr)
            os.write(file, f"{step}\n".encode())

        Trainer.step = step_and_record
    run(lambda: pretrain_imagenet.main(arguments))


# ---------------------------------------------------------------- one run


def make_command(folder: Path, data: Path, epochs: int) -> list[str]:
    """The command that starts a run in `folder` and also resumes it."""
    torchrun = (
        "-m torch.distributed.run --nproc_per_node=2 --standalone --monitor_interval=0.05 "
        "--max_restarts=100 --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
    )
    flags = (
        "--model twistnet18 --img_size 32 --batch_size 4 --workers 1 --save_minutes 0.03 "
        f"--resume auto --epochs {epochs}"
    )
    return [
        *(sys.executable, *torchrun.split(), __file__, "--record", str(folder / "steps")),
        *(*flags.split(), "--data_dir", str(data)),
        *("--checkpoint_dir", str(folder / "checkpoints"), "--weights_dir", str(folder)),
    ]


def attempt(folder: Path, data: Path, epochs: int, rng: random.Random, tally: Tally) -> bool:
    """Start or resume a run and inject faults until it ends. Returns whether it is finished."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = make_command(folder, data, epochs)
    with open(folder / "output.log", "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env)
    while process.poll() is None and tally.faults.total() < tally.wanted:
        inject(folder, process, rng, tally)
    code = process.wait()
    wait_for_ranks(folder)
    return code == 0


def inject(folder: Path, process: subprocess.Popen, rng: random.Random, tally: Tally) -> None:
    """Inject one fault at a random moment after the first step that follows a start."""
    # while it is starting there is nothing to lose: wait for the first step
    steps = folder / "steps"
    before = steps.stat().st_size if steps.exists() else 0
    while process.poll() is None and (
        not steps.exists() or steps.stat().st_size <= before + len(STARTED) + 1
    ):
        time.sleep(0.02)
    time.sleep(rng.uniform(0, 4))

    # tear the latest checkpoint if that is the fault, then send the signal
    target, number = rng.choice(FAULTS)
    targets = find_ranks(process.pid) if target == "rank" else [process.pid]
    latest, previous = (folder / "checkpoints" / name for name in (LATEST, PREVIOUS))
    if target == LATEST and previous.exists():
        content = latest.read_bytes()
        latest.unlink()  # first: latest.prev.pt may be the same file
        latest.write_bytes(content[: len(content) // 2])
    if process.poll() is None and targets:
        os.kill(rng.choice(targets), number)
        tally.faults[f"{target} {number.name}"] += 1
        print(f"{tally.faults.total()} of {tally.wanted} kills", end="\r", flush=True)


def find_ranks(torchrun: int) -> list[int]:
    """The process ids of torchrun's children."""
    try:
        text = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text()
    except OSError:
        return []
    return [int(word) for word in text.split()]


def wait_for_ranks(folder: Path) -> None:
    """Wait until no rank holds the checkpoint folder: ranks notice soon that torchrun has died."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not is_locked(folder / "checkpoints"):
            return
        time.sleep(0.1)
    raise UserError(f"ranks of a dead torchrun still hold {folder} after a minute")


# ---------------------------------------------------------------- the comparison


def load_result(folder: Path) -> tuple[dict, list[dict]]:
    """The exported weights, and the log without its timings."""
    weights = torch.load(folder / "twistnet18_imagenet.pt", weights_only=True)
    lines = (folder / "checkpoints" / "log.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return weights, [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


def report(whole: Path, interrupted: Path, tally: Tally, seconds: float) -> bool:
    """Print the table. Returns whether the interrupted run equals the undisturbed one."""
    # weights and logs
    weights, rows = load_result(whole)
    other_weights, other_rows = load_result(interrupted)
    same_weights = weights.keys() == other_weights.keys() and all(
        torch.equal(weights[name], other_weights[name]) for name in weights
    )
    same_log = rows == other_rows

    # steps, starts and fallbacks of the interrupted run
    undisturbed = (whole / "steps").read_text().split()
    recorded = (interrupted / "steps").read_text().split()
    total = len(undisturbed) - 1
    done = [int(step) for step in recorded if step != STARTED]
    lost = set(range(total)) - set(done)
    resumes = recorded.count(STARTED) - 1
    output = (interrupted / "output.log").read_bytes()
    fallbacks = re.findall(rb"^warning: .*" + re.escape(PREVIOUS.encode()), output, re.M)

    table = {
        "kills": tally.faults.total(),
        "resumes": resumes,
        f"fallbacks to {PREVIOUS}": len(fallbacks),
        "steps of the run": total,
        "steps repeated": len(done) - len(set(done)),
        "steps lost": len(lost),
        "weights, bit for bit": "equal" if same_weights else "NOT EQUAL",
        "log, but for timings": "equal" if same_log else "NOT EQUAL",
        "seconds": round(seconds),
        **{f"  {kind}": count for kind, count in sorted(tally.faults.items())},
    }
    for name, count in table.items():
        print(f"{name:<28} {count}")
    no_crash = resumes <= tally.faults.total() and undisturbed.count(STARTED) == 1
    if not no_crash:
        print("a run ended by itself, and torchrun restarted it")
    return same_weights and same_log and not lost and no_crash


def main() -> None:
    parser = Parser(prog="python tests/torture.py", description=__doc__)
    parser.add_argument(
        "--kills", type=at_least(1), default=10, metavar="N", help="number of faults to inject"
    )
    parser.add_argument(
        "--seed",
        type=at_least(0),
        default=0,
        metavar="S",
        help="seed of the moments and kinds of the faults",
    )
    args = parser.parse_args()
    started, rng, tally = time.monotonic(), random.Random(args.seed), Tally(args.kills)
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        # data, and the undisturbed run
        data, whole, interrupted = (Path(name) / part for part in ("data", "whole", "interrupted"))
        write_imagenet_tree(data, train_per_class=48, val_per_class=4, size=40, seed=0)
        for folder in (whole, interrupted):
            folder.mkdir()
        epochs = 1 + args.kills // 4  # of 48 steps each: long enough for all faults
        if not attempt(whole, data, epochs, rng, Tally(0)):
            raise UserError((whole / "output.log").read_text()[-2000:])

        # the interrupted run, restarted until it is finished
        before = -1
        while not attempt(interrupted, data, epochs, rng, tally):
            if tally.faults.total() == before:
                output = (interrupted / "output.log").read_text()
                raise UserError("it failed without a fault: " + output[-2000:])
            before = tally.faults.total()
        equal = report(whole, interrupted, tally, time.monotonic() - started)
    if not equal:
        raise UserError("the interrupted run differs from the undisturbed one")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--record"]:
        pretrain_and_record(sys.argv[2], sys.argv[3:])
    else:
        run(main)
