"""Kill a real pretraining again and again, and show that nothing was lost.

  python -m tools.torture --kills 50

Pretrains on synthetic textures under torchrun with two processes: once undisturbed, and once
killed (-9) or signalled at random moments, a rank or torchrun itself, at times with a torn
latest.pt. torchrun starts the ranks again when one was killed, and this tool starts torchrun again.
At the end both runs have the same weights, bit for bit, and the same log but for its timings.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

import pretrain_imagenet
from common.cli import Parser, at_least, run
from common.errors import UserError
from common.files import is_locked
from data.synthetic import write_imagenet_tree
from training.checkpoint import LATEST, PREVIOUS
from training.engine import Trainer

ROOT = Path(__file__).resolve().parent.parent
TIMINGS = ("images_per_s", "data_wait", "seconds")
BLOWS = (
    (LATEST, signal.SIGKILL),  # torn, as by a power cut, and then torchrun is killed
    ("torchrun", signal.SIGKILL),
    ("torchrun", signal.SIGTERM),
    ("torchrun", signal.SIGINT),
    ("rank", signal.SIGKILL),
    ("rank", signal.SIGTERM),
    ("rank", signal.SIGUSR1),
)


@dataclass
class Tally:
    """Blows so far, by kind, and how many there are to be."""

    wanted: int
    kills: Counter = field(default_factory=Counter)


def command(folder: Path, data: Path, epochs: int) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        "--monitor_interval=0.05",
        "--max_restarts=100",
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2",
        __file__,
        "--record",
        str(folder / "steps"),
        "--data_dir",
        str(data),
        "--model",
        "twistnet18",
        "--img_size",
        "32",
        "--batch_size",
        "4",
        "--workers",
        "1",
        "--epochs",
        str(epochs),
        "--save_minutes",
        "0.03",
        "--resume",
        "auto",
        "--checkpoint_dir",
        str(folder / "checkpoints"),
        "--weights_dir",
        str(folder),
    ]


def ranks(torchrun: int) -> list[int]:
    """The process ids of torchrun's children."""
    try:
        text = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text()
    except OSError:
        return []
    return [int(word) for word in text.split()]


def pretrain_recorded(record: str, arguments: list[str]) -> None:
    """pretrain_imagenet.py, as a rank of torchrun, noting each step that it has done."""
    original = Trainer.step
    file = os.open(record, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    if os.environ["RANK"] == "0":
        os.write(file, b"start\n")

    def step(self, batches, *, step: int, lr: float) -> None:
        original(self, batches, step=step, lr=lr)
        if self.world.main:
            os.write(file, f"{step}\n".encode())

    Trainer.step = step
    run(lambda: pretrain_imagenet.main(arguments))


def attempt(folder: Path, data: Path, epochs: int, rng: random.Random, tally: Tally) -> bool:
    """Start or resume the run, and strike it until it ends. Whether it is finished."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(folder / "output.log", "ab") as log:
        process = subprocess.Popen(command(folder, data, epochs), stdout=log, stderr=log, env=env)
    while process.poll() is None and tally.kills.total() < tally.wanted:
        strike(folder, process, rng, tally)
    code = process.wait()
    wait_for_ranks(folder)
    return code == 0


def strike(folder: Path, process: subprocess.Popen, rng: random.Random, tally: Tally) -> None:
    """One blow, at a moment from the first step after a start to well into the training."""
    steps = folder / "steps"
    before = steps.stat().st_size if steps.exists() else 0
    while process.poll() is None and (not steps.exists() or steps.stat().st_size <= before + 6):
        time.sleep(0.02)  # it is starting: there is nothing yet to lose
    time.sleep(rng.uniform(0, 4))
    target, number = rng.choice(BLOWS)
    victims = ranks(process.pid) if target == "rank" else [process.pid]
    latest, previous = (folder / "checkpoints" / name for name in (LATEST, PREVIOUS))
    if target == LATEST and previous.exists():
        whole = latest.read_bytes()
        latest.unlink()  # it may be best.pt too
        latest.write_bytes(whole[: len(whole) // 2])
    if process.poll() is None and victims:
        os.kill(rng.choice(victims), number)
        tally.kills[f"{target} {number.name}"] += 1
        print(f"{tally.kills.total()} of {tally.wanted} kills", end="\r", flush=True)


def wait_for_ranks(folder: Path) -> None:
    """Until nobody holds the checkpoint folder: ranks notice soon that torchrun is gone."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not is_locked(folder / "checkpoints"):
            return
        time.sleep(0.1)
    raise UserError(f"ranks of a dead torchrun still hold {folder} after a minute")


def final(folder: Path) -> tuple[dict, list[dict]]:
    """The exported weights, and the log without what depends on the clock."""
    weights = torch.load(folder / "twistnet18_imagenet.pt", weights_only=True)
    lines = (folder / "checkpoints" / "log.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return weights, [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


def report(whole: Path, hurt: Path, tally: Tally, seconds: float) -> bool:
    """Print the table. Whether the disturbed run equals the undisturbed one."""
    weights, rows = final(whole)
    hurt_weights, hurt_rows = final(hurt)
    same = weights.keys() == hurt_weights.keys() and all(
        torch.equal(weights[name], hurt_weights[name]) for name in weights
    )
    total = len((whole / "steps").read_text().splitlines()) - 1
    noted = (hurt / "steps").read_text().split()
    done = [int(step) for step in noted if step != "start"]
    lost = set(range(total)) - set(done)
    table = {
        "kills": tally.kills.total(),
        "resumes": noted.count("start") - 1,
        "fallbacks to latest.prev.pt": (hurt / "output.log")
        .read_bytes()
        .count(b"; going on from "),
        "steps of the run": total,
        "steps repeated": len(done) - len(set(done)),
        "steps lost": len(lost),
        "weights, bit for bit": "equal" if same else "NOT EQUAL",
        "log, but for timings": "equal" if rows == hurt_rows else "NOT EQUAL",
        "seconds": round(seconds),
    }
    for name, count in {**table, **{f"  {k}": v for k, v in sorted(tally.kills.items())}}.items():
        print(f"{name:<28} {count}")
    by_itself = table["resumes"] - table["kills"], (whole / "steps").read_text().count("start") - 1
    if max(by_itself) > 0:
        print("a run ended by itself, and torchrun started it again")
    return same and rows == hurt_rows and not lost and max(by_itself) <= 0


def main() -> None:
    parser = Parser(prog="python -m tools.torture", description=__doc__)
    parser.add_argument("--kills", type=at_least(1), default=10, metavar="N", help="how many")
    parser.add_argument(
        "--seed",
        type=at_least(0),
        default=0,
        metavar="S",
        help="of the moments and the kinds of kills",
    )
    args = parser.parse_args()
    started, rng, tally = time.monotonic(), random.Random(args.seed), Tally(args.kills)
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        data, whole, hurt = (Path(name) / part for part in ("data", "whole", "hurt"))
        write_imagenet_tree(data, train_per_class=48, val_per_class=4, size=40, seed=0)
        for folder in (whole, hurt):
            folder.mkdir()
        epochs = 1 + args.kills // 4  # of 48 steps: long enough for all the kills
        if not attempt(whole, data, epochs, rng, Tally(0)):
            raise UserError((whole / "output.log").read_text()[-2000:])
        struck = -1
        while not attempt(hurt, data, epochs, rng, tally):
            if tally.kills.total() == struck:
                raise UserError("it failed by itself: " + (hurt / "output.log").read_text()[-2000:])
            struck = tally.kills.total()
        equal = report(whole, hurt, tally, time.monotonic() - started)
    if not equal:
        raise UserError("the disturbed run is not the run it would have been")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--record"]:
        pretrain_recorded(sys.argv[2], sys.argv[3:])
    else:
        run(main)
