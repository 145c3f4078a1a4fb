"""Fine-tune one network on one fold of a texture dataset with one seed, and test it once.

  python train.py --data_dir data/dtd --dataset dtd --fold 1 --seed 42 --model twistnet18 \\
      --epochs 100 --run_dir runs/test

The epoch with the best validation accuracy is tested. Writes config.json, log.jsonl, latest.pt,
best.pt and, at the end, results.json into RUN_DIR/<dataset>_fold<k>_<model>_seed<s>/. The same
command again resumes an interrupted run and leaves a finished one as it is.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

import torch

from common.cli import Parser, add_amp_flags, add_saving_flags, at_least, run
from common.errors import Diverged, Preempted, UserError
from common.files import write_json
from common.processes import read_integer, usable_cpus
from data.cache import check_uncached, with_pixel_cache
from data.images import EvalSet, ImageFiles, TrainSet, spot_check
from data.loading import EvalLoader, TrainLoader
from data.sampling import StepSampler, check_batch_norm, seed_network
from data.splits import Splits, fingerprint
from data.textures import DATASETS, download_dtd, load_splits
from data.transforms import Augment, EvalTransform, make_augmentation
from models import add_model_flag, build_model
from models.fitting import head_of
from models.macs import count_macs
from models.twistnet import read_gates
from models.weights import load_pretrained, weights_identity
from training.checkpoint import (
    BEST,
    LATEST,
    PREVIOUS,
    TrainState,
    has_checkpoint,
    load_checkpoint,
    load_tensors,
)
from training.distributed import DistributedContext, init_distributed
from training.engine import EvalMetrics, Evaluator, Trainer, check_precision, choose_precision
from training.loop import TrainLoop
from training.optim import make_optimizer, make_schedule
from training.preemption import StopRequest
from training.recipes import FINETUNE
from training.results import RESULTS, describe_accuracies, run_name
from training.run_config import CONFIG, adopt_precision, check_same_config, load_finished
from training.run_dir import RunDir, provenance
from training.tensorboard import TensorBoardLogger

MIN_EVAL_BATCH = 32  # images: small training batches need not make evaluations slow


def make_parser() -> Parser:
    parser = Parser(prog="train.py", description=__doc__)
    add_data_flags(parser.add_argument_group("data"))
    add_recipe_flags(parser.add_argument_group("recipe"))
    add_amp_flags(parser.add_argument_group("speed"))
    add_file_flags(parser.add_argument_group("files"))
    return parser


def add_data_flags(group) -> None:
    group.add_argument(
        "--data_dir",
        type=Path,
        default=Path("data/dtd"),
        metavar="DIR",
        help="folder of the dataset; data/README.md lists the layouts",
    )
    group.add_argument(
        "--dataset",
        default="dtd",
        choices=DATASETS,
        metavar="NAME",
        help=f"one of {', '.join(DATASETS)}",
    )
    group.add_argument(
        "--fold", type=at_least(1), default=1, metavar="K", help="fold of the dataset, from 1"
    )
    group.add_argument(
        "--num_folds",
        type=at_least(1),
        default=10,
        metavar="N",
        help="number of random splits of --dataset folder",
    )
    group.add_argument(
        "--download",
        action="store_true",
        help="download DTD into --data_dir first, unless it is there",
    )
    group.add_argument(
        "--workers",
        type=at_least(0),
        default=4,
        metavar="N",
        help="loader workers, at most one per CPU core",
    )
    group.add_argument(
        "--no_cache",
        action="store_true",
        help="decode the images in every epoch instead of caching their pixels once for all runs "
        "in .twistnet_cache beside them (unless they would take half of the memory)",
    )


def add_recipe_flags(group) -> None:
    add_model_flag(group)
    group.add_argument(
        "--pretrained",
        default="auto",
        metavar="auto|none|PATH",
        help="initial weights. auto: weights/<model>_imagenet.pt (timm-NAME_imagenet.pt for "
        "timm/NAME), else torchvision's ResNet-18 (for TwistNet its first stages only, with a "
        "warning) or timm's own weights; none: train from scratch; PATH: a weights file or a "
        "training checkpoint",
    )
    group.add_argument(
        "--seed",
        type=at_least(0),
        default=42,
        metavar="S",
        help="seed of the new layers, the data order and the augmentation",
    )
    group.add_argument(
        "--epochs", type=at_least(1), default=100, metavar="N", help="number of training epochs"
    )
    group.add_argument(
        "--batch_size",
        type=at_least(1),
        default=32,
        metavar="B",
        help="images per step; lower it if you run out of memory",
    )
    group.add_argument(
        "--lr",
        type=at_least(0, float),
        default=FINETUNE["lr"],
        metavar="LR",
        help="peak learning rate, after the warm-up; a new classifier on pretrained weights has "
        f"{FINETUNE['head_lr_factor']:g} times this",
    )
    group.add_argument(
        "--img_size",
        type=at_least(32),
        default=224,
        metavar="PX",
        help="side of the crop, in pixels",
    )


def add_file_flags(group) -> None:
    group.add_argument(
        "--run_dir",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="folder in which this run gets a folder of its own",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="archive an existing run in RUN_DIR/overwritten and start a new one",
    )
    add_saving_flags(group)


def run_folder(args: argparse.Namespace) -> Path:
    return args.run_dir / run_name(args.dataset, args.fold, args.model, args.seed)


def main(argv: list[str] | None = None) -> None:
    # Flags.
    args = make_parser().parse_args(argv)
    if read_integer("WORLD_SIZE", 1) > 1:
        raise UserError(
            "train.py is one process per run: start it with python instead of torchrun, and many "
            "runs with run_all.py"
        )
    loggers = [TensorBoardLogger(run_folder(args))] if args.tensorboard else []

    # Data.
    splits = load_data(args)

    # The process, and the run's folder.
    context = init_distributed()
    config = make_config(args, splits, context.device)
    stop = StopRequest()
    run_dir = RunDir(run_folder(args))
    run_dir.lock()
    if args.overwrite and run_dir.contains_run():
        run_dir.archive(args.run_dir / "overwritten" / run_dir.path.name)
    results = load_finished(run_dir.path, config)
    if results:
        print(f"{run_dir.path} is finished: {describe_accuracies(results)}")
        return
    check_precision(context.device, config["precision"])

    # The state: of a new run, or of the one to resume.
    state, tensors = load_state(run_dir.path, config)
    state = state or TrainState(config, splits.classes, len(splits.train))
    with run_dir.recording_failure():
        # Loaders.
        if not args.no_cache:
            workers = min(args.workers, usable_cpus())
            splits = with_pixel_cache(splits, workers=workers, stop=lambda: stop.requested)
            check_uncached(splits)
        spot_check(splits.val)
        spot_check(splits.test)
        evaluators = {
            name: make_evaluator(getattr(splits, name), args, context, config)
            for name in ("val", "test")
        }
        train_loader, augment = make_train_loader(splits, args)

        # The network, and what trains it.
        torch.manual_seed(args.seed)
        model = build_model(args.model, len(splits.classes), img_size=args.img_size)
        if not tensors:
            state.weights = load_pretrained(
                model, args.model, args.pretrained, img_size=args.img_size
            )
        trainer = make_trainer(model, args, context, config, augment, state.weights)
        if tensors:
            load_tensors(trainer, tensors)
            tensors.clear()  # the host's copy, which nobody needs any more
        total_steps = args.epochs * train_loader.steps_per_epoch
        warmup_steps = min(FINETUNE["warmup_steps"], total_steps // 10)

        # Training.
        write_json(run_dir.path / CONFIG, config)
        resume_command = shlex.join(["python", *(w for w in sys.argv if w != "--overwrite")])
        TrainLoop(
            trainer,
            train_loader,
            evaluators["val"],
            lr_schedule=make_schedule(
                FINETUNE, base=args.lr, total_steps=total_steps, warmup_steps=warmup_steps
            ),
            epochs=args.epochs,
            run_dir=run_dir,
            stop=stop,
            resume_command=resume_command,
            loggers=loggers,
            extra_columns=lambda: read_gates(model),
            save_seconds=60 * args.save_minutes,
            needs_best=True,
        ).fit(state)

        # The test, of the best epoch.
        leave_if_requested(stop, run_dir, resume_command)
        load_tensors(trainer, load_best(run_dir.path, state))
        metrics = evaluators["test"].run(model)
        results = make_results(args, config, splits, state, model, metrics)
        write_json(run_dir.path / RESULTS, results)
        run_dir.write_status("finished", epoch=args.epochs)
    (run_dir.path / PREVIOUS).unlink(missing_ok=True)  # a sweep has many runs
    print(
        f"test_acc {results['test_acc']:.1f} ({metrics.top1} of {metrics.num_images}) from epoch "
        f"{results['best_epoch']}, val_acc {results['val_acc']:.1f}: {run_dir.path / RESULTS}"
    )


# ---------------------------------------------------------------- parts of a run


def load_data(args: argparse.Namespace) -> Splits:
    if args.download:
        if args.dataset != "dtd":
            raise UserError(
                f"--download is only for dtd, not for {args.dataset}: see data/README.md"
            )
        download_dtd(args.data_dir)
    return load_splits(args.dataset, args.data_dir, args.fold, num_folds=args.num_folds)


def make_config(args: argparse.Namespace, splits: Splits, device: torch.device) -> dict:
    """What this run is; two runs with the same configuration give the same results."""
    precision = choose_precision(device, args.amp)
    if not args.overwrite:
        precision = adopt_precision(precision, run_folder(args), args.amp)
    names = ["dataset", "fold", "seed", "model", "epochs", "batch_size", "lr", "img_size"]
    if args.dataset == "folder":
        names.append("num_folds")
    return {
        **{name: getattr(args, name) for name in names},
        "precision": precision,
        **{name: value for name, value in FINETUNE.items() if name != "lr"},
        "data": fingerprint(splits),
        "weights": weights_identity(args.model, args.pretrained),
        "data_dir": str(args.data_dir.resolve()),
    }


def load_state(folder: Path, config: dict) -> tuple[TrainState | None, dict | None]:
    """The state and tensors of an interrupted run of this configuration, or None."""
    if not has_checkpoint(folder):
        if (folder / BEST).exists():
            raise UserError(
                f"{folder} has {BEST} without {LATEST}: restore it, or start again with --overwrite"
            )
        return None, None
    state, tensors, warning = load_checkpoint(folder / LATEST)
    check_same_config(folder, state.config, config)
    if warning:
        print(warning)
    print(f"resuming {folder / LATEST} in epoch {state.epoch + 1}, after step {state.step}")
    return state, tensors


def make_evaluator(
    source: ImageFiles, args: argparse.Namespace, context: DistributedContext, config: dict
) -> Evaluator:
    loader = EvalLoader(
        EvalSet(source, EvalTransform(args.img_size)),
        batch_size=max(args.batch_size, MIN_EVAL_BATCH),
        workers=args.workers,
    )
    return Evaluator(loader, context, config["precision"])


def make_train_loader(splits: Splits, args: argparse.Namespace) -> tuple[TrainLoader, Augment]:
    """The loader, and the device's part of the augmentation."""
    sampler = StepSampler(
        len(splits.train), seed=args.seed, micro_batch=args.batch_size, micro_batches=1
    )
    check_batch_norm(sampler, args.batch_size, args.img_size)
    transform, augment = make_augmentation(
        FINETUNE, size=args.img_size, seed=args.seed, num_classes=len(splits.classes)
    )
    dataset = TrainSet(splits.train, transform, args.seed)
    return TrainLoader(dataset, sampler, workers=args.workers), augment


def make_trainer(
    model: torch.nn.Module,
    args: argparse.Namespace,
    context: DistributedContext,
    config: dict,
    augment: Augment,
    weights: dict,
) -> Trainer:
    """The network on its device, with the optimizer of the recipe.

    A new classifier on pretrained `weights` learns faster than they do.
    """
    model.to(context.device, memory_format=torch.channels_last)
    factor = FINETUNE["head_lr_factor"] if weights["tensors_loaded"] else 1.0
    lr_factors = dict.fromkeys(head_of(args.model), factor)
    return Trainer(
        model,
        make_optimizer(FINETUNE, model, lr=args.lr, lr_factors=lr_factors),
        context,
        config["precision"],
        augment,
        label_smoothing=FINETUNE["label_smoothing"],
        clip_norm=FINETUNE["clip_norm"],
        seed_forward=lambda step, micro: seed_network(args.seed, step, micro),
    )


def leave_if_requested(stop: StopRequest, run_dir: RunDir, resume_command: str) -> None:
    """Leave before the test, if asked to; the finished epochs are saved."""
    if stop.requested:
        message = f"preempted before the test, resume with: {resume_command}"
        run_dir.write_status("preempted", message=message, resume=resume_command)
        raise Preempted(message)


def load_best(folder: Path, state: TrainState) -> dict:
    """The tensors of best.pt, which must be the best epoch that the log names."""
    try:
        best, tensors, _ = load_checkpoint(folder / BEST)
    except UserError as error:
        raise UserError(f"{error}: start again with --overwrite") from error
    if best.epoch != state.best_epoch:
        raise UserError(
            f"{folder / BEST} is not of the best epoch, {state.best_epoch}: start again with "
            "--overwrite"
        )
    return tensors


def make_results(
    args: argparse.Namespace,
    config: dict,
    splits: Splits,
    state: TrainState,
    model: torch.nn.Module,
    metrics: EvalMetrics,
) -> dict:
    """results.json: everything that a table, or a reader who doubts it, needs of this run."""
    if metrics.unreadable:
        raise UserError(
            "test images cannot be decoded, and the test uses every image: restore the files and "
            f"run the same command again: {', '.join(metrics.unreadable)}"
        )
    if metrics.has_diverged(config["precision"]):
        epoch = state.best_epoch
        raise Diverged(f"the test loss of epoch {epoch} is not finite: use a smaller --lr")

    # Predictions, and counts of true class × predicted class.
    labels, predictions = torch.from_numpy(splits.test.labels), metrics.predictions
    n = len(splits.classes)
    confusion = torch.bincount(labels * n + predictions, minlength=n * n).reshape(n, n)

    # Test files relative to --data_dir, so that they are found where the data is moved to.
    place = os.path.relpath(splits.root, args.data_dir)
    names = [os.fsdecode(name) for name in splits.test.files.tolist()]
    return {
        **{name: config[name] for name in ("model", "dataset", "fold", "seed", "epochs")},
        "best_epoch": state.best["epoch"],
        "val_acc": state.best["val_top1"],
        "test_acc": 100 * metrics.top1 / metrics.num_images,
        "val_correct": round(state.best["val_top1"] * len(splits.val) / 100),
        "val_images": len(splits.val),
        "test_correct": metrics.top1,
        "test_images": metrics.num_images,
        "train_images": len(splits.train),
        "classes": splits.classes,
        "confusion": confusion.tolist(),
        "test_labels": labels.tolist(),
        "test_predictions": predictions.tolist(),
        "test_files": [os.path.normpath(os.path.join(place, name)) for name in names],
        "settings": {name: value for name, value in config.items() if name != "weights"},
        "weights": state.weights,
        "parameters": sum(p.numel() for p in model.parameters()),
        "gmacs": count_macs(model, args.img_size) / 1e9,
        "seconds": sum(row["seconds"] for row in state.history),
        **provenance(),
    }


if __name__ == "__main__":
    run(main)
