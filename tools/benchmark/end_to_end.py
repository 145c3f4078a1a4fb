"""What whole processes cost: training runs beside the plain recipe's, and the start of one."""

import itertools
import json
import resource
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from common.errors import UserError
from common.files import read_json
from data.imagenet import load_imagenet
from data.splits import SPLITS
from data.textures import load_splits
from tools.benchmark.timing import interleaved

ROOT = Path(__file__).resolve().parent.parent.parent
PLAIN = ["-m", "tools.benchmark.plain"]


def pretrain(args) -> dict:
    """A pretraining of TwistNet-18 and its validation accuracy."""
    train, val, _ = load_imagenet(args.data_dir)
    read_once(train, val)

    def commands(out: Path, seed: int, *, ours: bool):
        plainly = [] if ours else [*PLAIN, "--nchw"]
        precision = [] if ours else ["--no_amp"]
        yield [
            *plainly,
            "pretrain_imagenet.py",
            *flags(args),
            *precision,
            "--seed",
            seed,
            "--checkpoint_dir",
            out,
            "--weights_dir",
            out,
        ]

    def accuracies(out: Path):
        yield json.loads((out / "log.jsonl").read_text().splitlines()[-1])["val_top1"]

    return end_to_end(args, commands, accuracies, images=args.epochs * len(train))


def sweep(args) -> dict:
    """Two networks on two folds of DTD, from scratch: run_all.py, or train.py in a loop."""
    models, folds = ("resnet18", "twistnet18"), (1, 2)
    splits = [load_splits("dtd", args.data_dir, fold) for fold in folds]
    read_once(*(getattr(part, split) for part in splits for split in SPLITS))
    images = [len(part.train) for part in splits]

    def commands(out: Path, seed: int, *, ours: bool):
        data = out.parent / "data"  # beside it the cache of decoded images is written anew
        if not data.exists():
            data.mkdir()
            for name in ("images", "labels"):
                (data / name).symlink_to(splits[0].root.resolve() / name)
        common = [*flags(args), "--data_dir", data, "--pretrained", "none"]
        if ours:
            yield [
                "run_all.py",
                *common,
                "--models",
                ",".join(models),
                "--folds",
                "1-2",
                "--seeds",
                seed,
                "--jobs",
                2,
                "--run_dir",
                out,
            ]
        else:
            for model, fold in itertools.product(models, folds):
                yield [
                    *PLAIN,
                    "train.py",
                    "--no_amp",
                    "--no_cache",
                    *common,
                    "--model",
                    model,
                    "--fold",
                    fold,
                    "--seed",
                    seed,
                    "--run_dir",
                    out,
                ]

    def accuracies(out: Path):
        return [read_json(path)["test_acc"] for path in out.glob("*/results.json")]

    return end_to_end(args, commands, accuracies, images=args.epochs * len(models) * sum(images))


BUILD = """import os, torch, torchvision
from models import build_model
build_model("twistnet18", 47)
os._exit(0)"""  # as BEGIN ends: the end of a process is not part of its start
BEGIN = """import os, sys, train
train.Trainer.step = lambda *args, **kwargs: os._exit(0)
train.main(sys.argv[1:])"""


def start(args) -> dict:
    """From the command to the first step of train.py, beside the least that any script must do."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:

        def begin(number: int) -> None:
            call(
                [
                    "-c",
                    BEGIN,
                    *flags(args),
                    "--pretrained",
                    "none",
                    "--workers",
                    0,
                    "--run_dir",
                    Path(folder) / str(number),
                ]
            )

        rows = {"torch, torchvision, model": lambda number: call(["-c", BUILD]), "train.py": begin}
        return {"start": interleaved(rows, rounds=args.rounds, images=1, cpu_seconds=children_cpu)}


def flags(args) -> list:
    return [
        "--data_dir",
        args.data_dir.resolve(),
        "--img_size",
        args.img_size,
        "--epochs",
        args.epochs,
        "--batch_size",
        args.batch_size,
    ]


def read_once(*sources) -> None:
    """Bring the files into memory, so that the first row does not pay for the others."""
    for source in sources:
        for index in range(len(source)):
            with suppress(OSError):  # whoever trains on it has to say so
                source.read(index)


def end_to_end(args, commands: Callable, accuracies: Callable, *, images: int) -> dict:
    """Run both sides' commands with one seed a round; times, and the mean of the accuracies."""
    scores = {"plain loader, --no_amp": [], "ours": []}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:

        def side(name: str):
            def turn(number: int) -> None:
                out = Path(folder) / f"{name == 'ours'}-{number}"
                for command in commands(out, 42 + number, ours=name == "ours"):
                    call(command)
                scores[name] += accuracies(out)

            return turn

        table = interleaved(
            {name: side(name) for name in scores},
            rounds=args.rounds,
            warm=0,
            images=images,
            cpu_seconds=children_cpu,
        )
    for row in table:
        row["accuracy"] = sum(scores[row["row"]]) / len(scores[row["row"]])
    return {args.what: table, "images": images, "img_size": args.img_size}


def call(command: list) -> None:
    """Run Python with these arguments at the top of the project; UserError where it fails."""
    words = list(map(str, command))
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{shlex.join(words)} failed: {' '.join(done.stderr.split())[-1000:]}")


def children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
