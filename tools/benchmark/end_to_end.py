"""The cost of whole processes: training runs of ours beside plain_train.py."""

import itertools
import json
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from common.errors import UserError
from common.files import read_json
from common.processes import usable_cpus
from data.imagenet import load_imagenet
from data.images import ImageFiles
from data.splits import SPLITS, Splits
from data.synthetic import write_dtd
from data.textures import load_splits
from tools.benchmark.plain_train import plain_values
from tools.benchmark.timing import children_cpu_seconds, interleaved, run_python
from training.recipes import FINETUNE, PRETRAIN

PLAIN, OURS = "plain_train.py", "ours"


def measure_pretrain(args) -> dict:
    """A pretraining of TwistNet-18, with its validation accuracy; also with args.recipe."""
    train, val, _ = load_imagenet(args.data_dir)
    if not isinstance(train, ImageFiles):
        raise UserError(f"--data_dir {args.data_dir} is packed: the plain recipe needs the tree")
    read_files(train, val)
    recipe = PRETRAIN["guide"]
    shared = [*make_flags(args), "--data_dir", args.data_dir.resolve(), "--model", "twistnet18"]
    shared += ["--workers", min(8, usable_cpus())]

    def run_plain(out: Path, seed: int) -> list[float]:
        lr = recipe["lr"] * args.batch_size / recipe["lr_images"]
        flags = [*plain_flags(recipe), "--lr", lr, "--seed", seed, "--out", out]
        run_python(["-m", "tools.benchmark.plain_train", *shared, *flags])
        return [read_json(out / "results.json")["last_val_acc"]]

    def run_ours(out: Path, seed: int, name: str = "guide") -> list[float]:
        flags = ["--recipe", name, "--seed", seed, "--checkpoint_dir", out, "--weights_dir", out]
        run_python(["pretrain_imagenet.py", *shared, *flags])
        last_epoch = (out / "log.jsonl").read_text().splitlines()[-1]
        return [json.loads(last_epoch)["val_top1"]]

    sides = {PLAIN: run_plain, OURS: run_ours}
    if args.recipe != "guide":
        sides[f"{OURS}, recipe {args.recipe}"] = partial(run_ours, name=args.recipe)
    return measure(args, "pretrain", sides, images=args.epochs * len(train))


def measure_sweep(args) -> dict:
    """Two networks on two folds of DTD, from scratch: run_all.py, or the plain script in a loop."""
    models, folds = ("resnet18", "twistnet18"), (1, 2)
    splits = {fold: load_splits("dtd", args.data_dir, fold) for fold in folds}
    read_files(*(getattr(part, split) for part in splits.values() for split in SPLITS))

    def run_plain(out: Path, seed: int) -> list[float]:
        accuracies = []
        shared = [*make_flags(args), *plain_flags(FINETUNE), "--seed", seed, "--lr", FINETUNE["lr"]]
        for model, fold in itertools.product(models, folds):
            tree = link_tree(splits[fold], out / f"fold{fold}")
            run = out / f"{model}_fold{fold}"
            words = ["--data_dir", tree, "--out", run, "--model", model]
            words += ["--workers", min(4, usable_cpus())]
            run_python(["-m", "tools.benchmark.plain_train", *shared, *words])
            accuracies.append(read_json(run / "results.json")["val_acc"])
        return accuracies

    def run_ours(out: Path, seed: int) -> list[float]:
        # links to the data in a new folder, so that the cache of decoded images starts empty
        data = out / "data"
        data.mkdir(parents=True)
        for name in ("images", "labels"):
            (data / name).symlink_to(splits[1].root.resolve() / name)
        flags = ["--models", ",".join(models), "--folds", "1-2", "--seeds", seed, "--jobs", 2]
        flags += ["--pretrained", "none", "--data_dir", data, "--run_dir", out / "runs"]
        run_python(["run_all.py", *make_flags(args), *flags])
        return [read_json(path)["val_acc"] for path in (out / "runs").glob("*/results.json")]

    images = args.epochs * len(models) * sum(len(part.train) for part in splits.values())
    return measure(args, "sweep", {PLAIN: run_plain, OURS: run_ours}, images=images)


def measure_start(args) -> dict:
    """The fixed cost of a run: one epoch of ResNet-18 on eight small images, from start to exit."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        write_dtd(
            folder / "dtd", images_per_class=6, folds=1, size=args.img_size, seed=0, num_classes=2
        )
        splits = load_splits("dtd", folder / "dtd", 1)
        tree = link_tree(splits, folder / "tree")
        shared = ["--model", "resnet18", "--epochs", 1, "--batch_size", 2, "--workers", 0]
        shared += ["--img_size", args.img_size]

        def run_plain(number: int) -> None:
            words = ["--data_dir", tree, "--out", folder / f"plain-{number}"]
            run_python(["-m", "tools.benchmark.plain_train", *shared, *words])

        def run_ours(number: int) -> None:
            words = ["--data_dir", folder / "dtd", "--run_dir", folder / f"ours-{number}"]
            run_python(["train.py", *shared, "--pretrained", "none", *words])

        table = interleaved(
            {PLAIN: run_plain, "train.py": run_ours},
            rounds=args.rounds,
            images=1,
            cpu_seconds=children_cpu_seconds,
        )
    return {"start": table}


def make_flags(args) -> list:
    """The flags that both sides have."""
    return [
        *("--img_size", args.img_size),
        *("--epochs", args.epochs),
        *("--batch_size", args.batch_size),
    ]


def plain_flags(recipe: dict) -> list:
    """The flags of plain_train.py for a recipe's augmentation."""
    return [word for name, x in plain_values(recipe).items() for word in (f"--{name}", x)]


def link_tree(splits: Splits, tree: Path) -> Path:
    """A tree of links, train/<class>/ and val/<class>/, for ImageFolder."""
    if tree.exists():
        return tree
    for split in ("train", "val"):
        source = getattr(splits, split)
        for index, label in enumerate(source.labels.tolist()):
            path = source.path(index).resolve()
            folder = tree / split / splits.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{index}{path.suffix}").symlink_to(path)
    return tree


def read_files(*sources) -> None:
    """Bring the files into the page cache, so that the first row does not pay for the others."""
    for source in sources:
        for index in range(len(source)):
            with suppress(OSError):  # the run that uses it will report it
                source.path(index).read_bytes()


def measure(args, what: str, sides: dict[str, Callable], *, images: int) -> dict:
    """Run both sides with one seed per round; their times, and the means of their accuracies."""
    accuracies = {name: [] for name in sides}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:

        def run_side(name: str, number: int) -> None:
            out = Path(folder) / f"{name}-{number}"
            accuracies[name].extend(sides[name](out, 42 + number))

        table = interleaved(
            {name: partial(run_side, name) for name in sides},
            rounds=args.rounds,
            warm=0,
            images=images,
            cpu_seconds=children_cpu_seconds,
        )
    for row in table:
        found = accuracies[row["row"]]
        row["accuracy"] = sum(found) / len(found)
    return {what: table, "images": images, "img_size": args.img_size}
