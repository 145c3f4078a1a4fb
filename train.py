"""Fine-tune one network on one fold of a texture dataset with one seed, and test it once.

  python train.py --data_dir data/dtd --dataset dtd --fold 1 --seed 42 --model twistnet18 \\
      --epochs 100 --run_dir runs/test

The best validation epoch is tested. Writes RUN_DIR/<dataset>_fold<k>_<model>_seed<s>/ with
config.json, log.jsonl, latest.pt, best.pt and, last of all, results.json. The same command again
goes on with an interrupted run and leaves a finished one as it is.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

import torch
from torch import nn

from common.cli import Parser, add_amp_flags, add_tensorboard_flag, at_least, run
from common.errors import UserError
from common.files import write_json
from common.processes import ignore_stop_signals, usable_cpus
from data.cache import with_pixel_cache
from data.images import EvalSet, ImageFiles, TrainSet, spot_check
from data.loading import eval_batches, train_steps
from data.sampling import StepSampler
from data.splits import Splits, fingerprint
from data.textures import DATASETS, download_dtd, load_splits
from data.transforms import EvalTransform, make_augmentation, normalise
from models import MODELS, build_model
from models.twistnet import TwistBlock
from models.weights import load_pretrained, weights_identity
from training import run_config
from training.checkpoint import BEST, LATEST, PREVIOUS, load_checkpoint
from training.distributed import World, start_processes
from training.engine import Trainer, choose_precision, evaluate
from training.loop import Progress, Run, restore
from training.optim import lr_at, make_sgd, warmup_steps
from training.preemption import StopRequest
from training.run_config import (
    CONFIG,
    RESULTS,
    check_same_config,
    load_config,
    load_finished,
    run_name,
)
from training.run_dir import Folder, provenance
from training.tensorboard import Board

RECIPE = {
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 1e-4,
    "warmup_epochs": 5,
    "label_smoothing": 0.1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "randaugment": [2, 9],
    "crop_scale": [0.2, 1.0],
    "clip_norm": 1.0,
}


def make_parser() -> Parser:
    parser = Parser(prog="train.py", description=__doc__)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data_dir",
        type=Path,
        default=Path("data/dtd"),
        metavar="DIR",
        help="where the dataset lies, see data/README.md",
    )
    data.add_argument(
        "--dataset",
        default="dtd",
        choices=DATASETS,
        metavar="NAME",
        help=f"one of {', '.join(DATASETS)}",
    )
    data.add_argument("--fold", type=at_least(1), default=1, metavar="K", help="which split")
    data.add_argument(
        "--num_folds",
        type=at_least(1),
        default=10,
        metavar="N",
        help="of --dataset folder: how many reshuffles there are",
    )
    data.add_argument(
        "--download",
        action="store_true",
        help="fetch DTD into --data_dir first, unless it is there",
    )
    data.add_argument(
        "--workers",
        type=at_least(0),
        default=4,
        metavar="N",
        help="loader processes, at most the CPUs there are",
    )
    data.add_argument(
        "--no_cache",
        action="store_true",
        help="decode the images in every epoch, instead of once for all runs into "
        ".twistnet_cache beside them",
    )
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument(
        "--model",
        default="twistnet18",
        choices=MODELS,
        metavar="NAME",
        help=f"one of {', '.join(MODELS)}",
    )
    recipe.add_argument(
        "--pretrained",
        default="auto",
        metavar="auto|none|PATH",
        help="auto finds weights/<model>_imagenet.pt; none starts from scratch",
    )
    recipe.add_argument(
        "--seed",
        type=at_least(0),
        default=42,
        metavar="S",
        help="of the new layers, order and augmentation",
    )
    recipe.add_argument("--epochs", type=at_least(1), default=100, metavar="N", help="epochs")
    recipe.add_argument(
        "--batch_size", type=at_least(1), default=32, metavar="B", help="images a step"
    )
    recipe.add_argument(
        "--lr",
        type=at_least(0, float),
        default=0.01,
        metavar="LR",
        help="learning rate after the warm-up",
    )
    recipe.add_argument("--img_size", type=at_least(32), default=224, metavar="PX", help="crop")
    add_amp_flags(parser.add_argument_group("speed"))
    files = parser.add_argument_group("files")
    files.add_argument(
        "--run_dir", type=Path, default=Path("runs"), metavar="DIR", help="folder of run folders"
    )
    files.add_argument(
        "--overwrite",
        action="store_true",
        help="start anew where a run lies: its files move to RUN_DIR/overwritten",
    )
    files.add_argument(
        "--save_minutes",
        type=at_least(0, float),
        default=15,
        metavar="M",
        help="time between checkpoints within an epoch",
    )
    add_tensorboard_flag(files)
    return parser


def run_folder(args: argparse.Namespace) -> Path:
    return args.run_dir / run_name(args.dataset, args.fold, args.model, args.seed)


def load_data(args: argparse.Namespace) -> Splits:
    if args.download:
        if args.dataset != "dtd":
            raise UserError(f"--download fetches dtd only, not {args.dataset}: see data/README.md")
        download_dtd(args.data_dir)
    return load_splits(args.dataset, args.data_dir, args.fold, num_folds=args.num_folds)


def make_config(args: argparse.Namespace, splits: Splits, device: torch.device) -> dict:
    """What this run is; two runs with the same configuration give the same results.

    A run that was started on another machine keeps the default precision of that machine.
    """
    precision = choose_precision(device, args.amp)
    if args.amp is None and not args.overwrite:
        precision = (load_config(run_folder(args)) or {}).get("precision") or precision
    return run_config.make_config(
        dataset=args.dataset,
        fold=args.fold,
        num_folds=args.num_folds,
        seed=args.seed,
        model=args.model,
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        img_size=args.img_size,
        precision=precision,
        recipe=RECIPE,
        data=fingerprint(splits),
        weights=weights_identity(args.model, args.pretrained),
        data_dir=args.data_dir,
    )


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            "train.py is one process a run: start it with python, not torchrun, and "
            "many runs with run_all.py"
        )
    board = Board(run_folder(args), wanted=args.tensorboard)
    splits = load_data(args)
    world = start_processes()
    config = make_config(args, splits, world.device)
    folder = Folder(run_folder(args))
    stop = StopRequest()
    folder.lock()
    if args.overwrite and (folder.holds_run() or (folder.path / CONFIG).exists()):
        aside = folder.set_aside(args.run_dir / "overwritten" / folder.path.name)
        print(f"--overwrite: the old run now lies in {aside}", flush=True)
    results = load_finished(folder.path, config)
    if results:
        print(
            f"{folder.path} is finished: val_acc {results['val_acc']:.1f}, test_acc "
            f"{results['test_acc']:.1f}"
        )
        return
    if not args.no_cache:
        splits = with_pixel_cache(
            splits, workers=min(args.workers, usable_cpus()), stop=lambda: bool(stop)
        )
    spot_check(splits.val)
    spot_check(splits.test)
    state = load_started(folder.path, config)
    torch.manual_seed(args.seed)
    model = build_model(args.model, len(splits.classes))
    weights = state["weights"] if state else load_pretrained(model, args.model, args.pretrained)
    the_run, test = make_run(args, config, splits, model, folder=folder, world=world, stop=stop)
    the_run.frozen["weights"] = weights
    the_run.follow = board
    if state:
        the_run.progress = restore(the_run.trainer, state)
    write_json(folder.path / CONFIG, config)
    the_run.fit()

    best, _ = load_checkpoint(folder.path / BEST)
    if len(best["rows"]) != the_run.progress.best["epoch"]:
        raise UserError(
            f"{folder.path / BEST} is not the run's best epoch, "
            f"{the_run.progress.best['epoch']}: --overwrite starts anew"
        )
    restore(the_run.trainer, best)
    score, predictions = test(the_run.check_stop)
    if score.unreadable:
        raise UserError(
            "test images cannot be read, and are never left out: restore them, then "
            f"run the same command: {', '.join(score.unreadable)}"
        )
    results = make_results(args, config, splits, the_run, weights, score, predictions)
    write_json(folder.path / RESULTS, results)
    folder.status("finished", epoch=args.epochs)
    (folder.path / PREVIOUS).unlink(missing_ok=True)  # a sweep has many runs
    print(
        f"test_acc {results['test_acc']:.1f} ({score.top1} of {score.images}) from epoch "
        f"{results['best_epoch']}, val_acc {results['val_acc']:.1f}: {folder.path / RESULTS}"
    )


def load_started(folder: Path, config: dict) -> dict | None:
    """The checkpoint of an interrupted run, if there is one."""
    if not any((folder / name).exists() for name in (LATEST, PREVIOUS)):
        return None
    state, warning = load_checkpoint(folder / LATEST)
    check_same_config(folder, state["config"], config)
    print(warning or f"going on with {folder / LATEST}", flush=True)
    return state


def make_run(args, config: dict, splits: Splits, model: nn.Module, *, folder, world: World, stop):
    """The run, and what scores the test set."""
    num_classes = len(splits.classes)
    model.to(world.device, memory_format=torch.channels_last)
    transform, augment = make_augmentation(
        RECIPE, size=args.img_size, seed=args.seed, num_classes=num_classes
    )
    trainer = Trainer(
        model,
        make_sgd(model, lr=args.lr, weight_decay=RECIPE["weight_decay"]),
        world,
        config["precision"],
        augment,
        label_smoothing=RECIPE["label_smoothing"],
        clip_norm=RECIPE["clip_norm"],
    )

    sampler = StepSampler(
        len(splits.train), seed=args.seed, micro_batch=args.batch_size, micro_batches=1
    )
    if sampler.micro_batch == 1 and args.img_size <= 32:
        raise UserError(
            "BatchNorm needs more than one value a channel: use a --batch_size above 1, "
            "or an --img_size above 32"
        )
    total = args.epochs * sampler.steps_per_epoch
    warmup = warmup_steps(
        RECIPE["warmup_epochs"], steps_per_epoch=sampler.steps_per_epoch, total_steps=total
    )
    loading = {
        "workers": min(args.workers, usable_cpus()),
        "worker_init": ignore_stop_signals,
        "pin_memory": world.device.type == "cuda",
    }

    def scorer(source: ImageFiles):
        batches, rounds = eval_batches(
            EvalSet(source, EvalTransform(args.img_size)),
            batch_size=max(args.batch_size, 32),
            **loading,
        )
        return lambda between: evaluate(
            trainer, batches, normalise, rounds=rounds, name_of=source.file_name, between=between
        )

    validate = scorer(splits.val)
    return Run(
        trainer,
        Progress(),
        folder,
        stop,
        steps_from=lambda first: train_steps(
            TrainSet(splits.train, transform, args.seed),
            sampler,
            first=first,
            last=total,
            **loading,
        ),
        validate=lambda between: validate(between)[0],
        lr_of=lambda step: lr_at(step, base=args.lr, total_steps=total, warmup_steps=warmup),
        epochs=args.epochs,
        steps_per_epoch=sampler.steps_per_epoch,
        name_of=splits.train.file_name,
        frozen={"config": config, "classes": splits.classes, "images": len(splits.train)},
        resume_with=shlex.join(["python", *(w for w in sys.argv if w != "--overwrite")]),
        extra_row=lambda: gates(model),
        save_seconds=60 * args.save_minutes,
    ), scorer(splits.test)


def gates(model: nn.Module) -> dict:
    """How far each TwistBlock's gate is open, for the log; nothing for other networks."""
    opened = [
        torch.sigmoid(block.gate).item()
        for block in model.modules()
        if isinstance(block, TwistBlock)
    ]
    return {"gates": opened} if opened else {}


def make_results(args, config, splits, the_run: Run, weights, score, predictions) -> dict:
    """results.json: what a table, and a doubtful reader, need of this run."""
    best, test = the_run.progress.best, splits.test
    place = os.path.relpath(splits.root, args.data_dir)
    order = predictions[:, 0].argsort()
    labels, predicted = torch.from_numpy(test.labels), predictions[order, 1]
    n = len(splits.classes)
    confusion = torch.bincount(labels * n + predicted, minlength=n * n).reshape(n, n)
    return {
        **{name: config[name] for name in ("model", "dataset", "fold", "seed", "epochs")},
        "best_epoch": best["epoch"],
        "val_acc": best["val_top1"],
        "test_acc": 100 * score.top1 / score.images,
        "val_correct": round(best["val_top1"] * len(splits.val) / 100),
        "val_images": len(splits.val),
        "test_correct": score.top1,
        "test_images": score.images,
        "train_images": len(splits.train),
        "classes": splits.classes,
        "confusion": confusion.tolist(),
        "test_labels": labels.tolist(),
        "test_predictions": predicted.tolist(),
        "test_files": [
            os.path.normpath(os.path.join(place, os.fsdecode(name))) for name in test.files.tolist()
        ],
        "settings": {name: value for name, value in config.items() if name != "weights"},
        "weights": weights,
        "parameters": sum(p.numel() for p in the_run.trainer.model.parameters()),
        "seconds": sum(row["seconds"] for row in the_run.progress.rows),
        **provenance(),
    }


if __name__ == "__main__":
    run(main)
