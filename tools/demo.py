"""Try the whole pipeline on synthetic data, in a few minutes on a CPU.

  python -m tools.demo

Draws procedural textures, pretrains ResNet-18 and TwistNet-18 on one set of them, fine-tunes both
from these weights on two folds of another, and compares them. Each command is printed before it
runs: it is the command of a real study, with smaller numbers. Everything is written to --out. If it
is interrupted, the same command resumes it.
"""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from common.cli import Parser, run
from common.errors import UserError
from common.files import LOCK, ROOT, check_output_folder, lock_folder, read_json
from common.processes import usable_cpus
from data.synthetic import write_dtd, write_imagenet_tree

MODELS = ("resnet18", "twistnet18")
FOLDS, SIZE, CLASSES = 2, 64, 8


def main() -> None:
    parser = Parser(prog="python -m tools.demo", description=__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "runs" / "demo",
        metavar="DIR",
        help="folder for everything that the demo writes",
    )
    out = parser.parse_args().out
    check_output_folder(out, flag="--out", made_by_tool=[LOCK])
    started = time.monotonic()
    with lock_folder(out, required=False):
        draw_data(out / "data")
        for model in MODELS:
            run_script("pretrain_imagenet.py", pretrain_flags(model), folder=out)
        run_script("run_all.py", sweep_flags(), folder=out)
    print_results(out, minutes=(time.monotonic() - started) / 60)


def draw_data(folder: Path) -> None:
    """Two sets of the same kinds of textures: an ImageNet tree, and DTD's layout with folds."""
    print(f"drawing {CLASSES} kinds of textures at {SIZE} px in {folder}")
    write_imagenet_tree(
        folder / "imagenet",
        train_per_class=120,
        val_per_class=25,
        size=SIZE,
        seed=1,
        num_classes=CLASSES,
    )
    write_dtd(
        folder / "dtd", images_per_class=48, folds=FOLDS, size=SIZE, seed=2, num_classes=CLASSES
    )


def pretrain_flags(model: str) -> str:
    return (
        f"--data_dir data/imagenet --model {model} --img_size {SIZE} --epochs 10 "
        f"--warmup_epochs 1 --batch_size 16 --lr 0.1 --checkpoint_dir checkpoints/{model} "
        "--resume auto"
    )


def sweep_flags() -> str:
    return (
        f"--data_dir data/dtd --dataset dtd --models {','.join(MODELS)} --folds 1-{FOLDS} "
        f"--seeds 42 --img_size {SIZE} --epochs 6 --batch_size 16 --jobs 2 --run_dir runs"
    )


def run_script(name: str, flags: str, *, folder: Path) -> None:
    """Print a script's command as one would type it in `folder`, and run it there."""
    script = os.path.relpath(ROOT / name, folder.resolve())  # `folder` may be behind a link
    words = [script, *flags.split()]
    print(f"\n$ cd {folder} && {shlex.join(['python', *words])}")
    env = {**os.environ, "TWISTNET_LAUNCHER": str(os.getpid())}  # it ends when this process does
    if subprocess.run([sys.executable, *words], cwd=folder, env=env).returncode:
        raise UserError(f"{name} failed, see its message above")


def print_results(out: Path, *, minutes: float) -> None:
    """Print the accuracies of both steps and where everything is."""
    print(f"\nResults of the demo ({minutes:.1f} minutes with {usable_cpus()} CPU cores)")
    print(f"{'network':<12}{'pretraining, top-1':>20}{f'fine-tuning, {FOLDS} folds':>24}")
    for model in MODELS:
        pretrained = read_json(out / "weights" / f"{model}_imagenet.json")["top1"]
        runs = [read_json(path) for path in (out / "runs").glob(f"*_{model}_*/results.json")]
        accuracy = sum(run["test_acc"] for run in runs) / len(runs)
        print(f"{model:<12}{f'{pretrained:.1f} %':>20}{f'{accuracy:.1f} %':>24}")
    chance = f"{100 / CLASSES:.1f} %"
    print(f"{'chance':<12}{chance:>20}{chance:>24}")
    print(
        f"\nFiles in {out}:\n"
        "  weights/               the pretrained weights, which run_all.py found by itself\n"
        "  checkpoints/<model>/   pretraining: latest.pt, best.pt, log.jsonl\n"
        "  runs/<run>/            fine-tuning: results.json, log.jsonl, best.pt, output.log\n"
        "  runs/table.md          the table above; also table.csv and table.tex"
    )


if __name__ == "__main__":
    run(main)
