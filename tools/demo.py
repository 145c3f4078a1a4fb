"""The whole way in minutes on a CPU: data → pretraining → weights found → sweep → table.

  python -m tools.demo

Draws procedural textures, pretrains ResNet-18 and TwistNet-18 on one set of them, fine-tunes both
on another over two folds, and compares them. Each command is printed before it runs: they are the
commands of a real study, on smaller numbers. All of it lies in --out. Run again, it goes on.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from common.cli import Parser, run
from common.errors import UserError
from data.synthetic import write_dtd, write_imagenet_tree

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("resnet18", "twistnet18")
SIZE, CLASSES = 64, 8


def call(command: list[str], folder: Path) -> None:
    """Print a command as one would type it in `folder`, and run it there."""
    script = os.path.relpath(ROOT / command[0], folder)
    print(f"\n$ cd {folder} && {shlex.join(['python', script, *command[1:]])}", flush=True)
    env = {**os.environ, "TWISTNET_LAUNCHER": str(os.getpid())}  # ends when this process does
    if subprocess.run([sys.executable, script, *command[1:]], cwd=folder, env=env).returncode:
        raise UserError(f"{command[0]} failed: its message stands above")


def main() -> None:
    parser = Parser(prog="python -m tools.demo", description=__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "runs" / "demo",
        metavar="DIR",
        help="everything is written in here (default: runs/demo)",
    )
    out = parser.parse_args().out
    print(f"drawing {CLASSES} kinds of textures at {SIZE} px in {out / 'data'}", flush=True)
    write_imagenet_tree(
        out / "data" / "imagenet",
        train_per_class=120,
        val_per_class=25,
        size=SIZE,
        seed=1,
        num_classes=CLASSES,
    )
    write_dtd(
        out / "data" / "dtd", images_per_class=48, folds=2, size=SIZE, seed=2, num_classes=CLASSES
    )
    for model in MODELS:
        call(
            [
                "pretrain_imagenet.py",
                "--data_dir",
                "data/imagenet",
                "--model",
                model,
                "--img_size",
                str(SIZE),
                "--epochs",
                "10",
                "--warmup_epochs",
                "1",
                "--batch_size",
                "16",
                "--lr",
                "0.1",
                "--checkpoint_dir",
                f"checkpoints/{model}",
                "--resume",
                "auto",
            ],
            out,
        )
    call(
        [
            "run_all.py",
            "--data_dir",
            "data/dtd",
            "--dataset",
            "dtd",
            "--models",
            ",".join(MODELS),
            "--folds",
            "1-2",
            "--seeds",
            "42",
            "--img_size",
            str(SIZE),
            "--epochs",
            "6",
            "--batch_size",
            "16",
            "--jobs",
            "2",
            "--run_dir",
            "runs",
        ],
        out,
    )
    print(
        f"\nby chance it would be {100 / CLASSES:.1f} %. What lies where, in {out}:\n"
        "  weights/               the pretrained weights, which run_all.py found by itself\n"
        "  checkpoints/<model>/   pretraining: latest.pt, best.pt, log.jsonl\n"
        "  runs/<run>/            fine-tuning: results.json, log.jsonl, best.pt, output.log\n"
        "  runs/table.md          the table above; also .csv and .tex"
    )


if __name__ == "__main__":
    run(main)
