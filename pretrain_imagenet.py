"""Pretrain a network on ImageNet, or on any tree of class folders, and write its weights.

  one GPU, or a CPU   python pretrain_imagenet.py --data_dir /path/to/imagenet
  four GPUs           torchrun --nproc_per_node=4 pretrain_imagenet.py --data_dir /path/to/imagenet
  two machines        torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d \\
                          --rdzv_endpoint=HOST:29400 pretrain_imagenet.py --data_dir ...
  go on after a stop  python pretrain_imagenet.py --data_dir ... --resume checkpoints/latest.pt

Writes latest.pt, best.pt, log.jsonl and, at the end, <model>_imagenet.pt with its .json into
--checkpoint_dir, and the last two into --weights_dir, where train.py and run_all.py find them.
"""

import json
import os
import secrets
import shlex
import time
from pathlib import Path

import torch

from data import DataError
from data.imagenet import load_imagenet
from data.images import EvalSet, TrainSet, quick_look
from data.loading import eval_batches, train_steps
from data.sampling import StepSampler
from data.transforms import Augment, EvalTransform, TrainTransform, normalise
from models import MODELS, ModelError, build_model
from training import RunError
from training.checkpoint import (
    LATEST,
    PREVIOUS,
    first_nonfinite,
    load_checkpoint,
    serialise,
    write_atomic,
)
from training.command_line import Parser, add_amp_flags, at_least, run
from training.distributed import World, start_processes, stop_processes, usable_cpus
from training.engine import Trainer, choose_precision, evaluate
from training.loop import Diverged, Progress, Run, restore
from training.optim import lr_at, make_sgd, warmup_steps
from training.preemption import StopRequest, ignore_stop_signals
from training.record import Folder, provenance, sha256, write_json

# What makes a run the run it is. A resumed run takes these from its checkpoint.
RUN_FLAGS = ("model", "epochs", "batch_size", "lr", "weight_decay", "warmup_epochs",
             "label_smoothing", "img_size", "seed")
RECIPE = {"mixup": 0.2, "cutmix": 1.0, "randaugment": [2, 9], "crop_scale": [0.08, 1.0],
          "momentum": 0.9, "nesterov": True, "schedule": "cosine over steps, after a warm-up"}


def make_parser() -> Parser:
    parser = Parser(description=__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--data_dir", type=Path, default=Path("data/imagenet"), metavar="DIR",
                      help="folder with train/ and val/, each of one folder of images a class")
    data.add_argument("--img_size", type=at_least(32), default=224, metavar="PX",
                      help="training and validation crop")
    data.add_argument("--workers", type=at_least(0), default=8, metavar="N",
                      help="loader processes per process, at most the CPUs it may use")
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--model", default="twistnet18", choices=MODELS, metavar="NAME",
                        help=f"one of {', '.join(MODELS)}")
    recipe.add_argument("--epochs", type=at_least(1), default=600, metavar="N", help="epochs")
    recipe.add_argument("--batch_size", type=at_least(1), default=256, metavar="B",
                        help="images a process and step")
    recipe.add_argument("--lr", type=at_least(0, float), default=0.1, metavar="LR",
                        help="learning rate for 256 images; times global batch / 256")
    recipe.add_argument("--weight_decay", type=at_least(0, float), default=1e-4, metavar="WD",
                        help="of convolutions and linear layers; none on norms, biases, gates")
    recipe.add_argument("--warmup_epochs", type=at_least(0, float), default=5, metavar="N",
                        help="linear warm-up before the cosine")
    recipe.add_argument("--label_smoothing", type=at_least(0, float), default=0.1, metavar="E",
                        help="kept on mixed targets")
    recipe.add_argument("--seed", type=at_least(0), default=42, metavar="S",
                        help="of initial weights, order and augmentation")
    add_amp_flags(parser.add_argument_group("speed")).add_argument(
        "--compile", action="store_true", help="torch.compile the network")
    files = parser.add_argument_group("files")
    files.add_argument("--checkpoint_dir", type=Path, default=Path("checkpoints"), metavar="DIR",
                       help="one run's checkpoints and log; one folder holds one run")
    files.add_argument("--weights_dir", type=Path, default=Path("weights"), metavar="DIR",
                       help="where the final weights are written and found")
    files.add_argument("--resume", type=Path, metavar="FILE",
                       help="checkpoint to go on from, in its folder; 'auto': latest.pt of "
                            "--checkpoint_dir if there is one")
    files.add_argument("--overwrite", action="store_true",
                       help="start anew where a run lies: its files are set aside")
    files.add_argument("--save_minutes", type=at_least(0, float), default=15, metavar="M",
                       help="time between checkpoints within an epoch")
    return parser


def parse_args(argv: list[str] | None = None):
    """The flags, and the checkpoint's state where the run is resumed, with its flags adopted."""
    parser = make_parser()
    args, given = parser.parse_args(argv), parser.given(argv)
    if args.label_smoothing >= 1:
        raise RunError("--label_smoothing must be below 1")
    if args.resume and args.overwrite:
        raise RunError("--resume goes on with a run, --overwrite starts anew: give one of them")
    if args.resume == Path("auto"):
        there = any((args.checkpoint_dir / name).exists() for name in (LATEST, PREVIOUS))
        args.resume = args.checkpoint_dir / LATEST if there else None
    if not args.resume:
        return args, None
    state, warning = load_checkpoint(args.resume)
    if warning and int(os.environ.get("RANK", 0)) == 0:
        print(warning, flush=True)
    if "checkpoint_dir" not in given:
        args.checkpoint_dir = args.resume.parent
    adopt_flags(args, given, state)
    return args, state


def adopt_flags(args, given: set[str], state: dict) -> None:
    """Take the run's flags from its checkpoint; RunError for a given one that contradicts it."""
    config = state["config"]
    if not isinstance(config, dict) or any(name not in config for name in RUN_FLAGS):
        raise RunError(f"{args.resume} is no checkpoint of pretrain_imagenet.py")
    if args.amp is not None and args.amp != (config["precision"] != "fp32"):
        raise RunError(f"--{'amp' if args.amp else 'no_amp'} contradicts {args.resume}, which was "
                       f"made in {config['precision']}: leave the flag out")
    for name in RUN_FLAGS:
        if name not in given:
            setattr(args, name, config[name])
        elif name != "epochs" and getattr(args, name) != config[name]:
            raise RunError(f"--{name} {getattr(args, name)} contradicts {args.resume}, which was "
                           f"made with {config[name]}: leave the flag out, or start a new run in "
                           "another --checkpoint_dir")
    if args.epochs < len(state["rows"]):
        raise RunError(f"--epochs {args.epochs} is less than the {len(state['rows'])} epochs that "
                       f"{args.resume} has trained")


def main(argv: list[str] | None = None) -> None:
    args, state = parse_args(argv)
    train, val, classes = load_imagenet(args.data_dir)
    quick_look(val)
    folder = Folder(args.checkpoint_dir)
    world = start_processes()
    stop = StopRequest()
    if world.main:
        claim(folder, args)
    config = make_config(args, state, world)
    sampler = share_out(len(train), config, world)
    if state:
        check_same_data(state, args, classes, len(train))
        if state["step"] > args.epochs * sampler.steps_per_epoch:
            raise RunError(f"--epochs {args.epochs} is less than {args.resume} has trained: its "
                           f"epoch {len(state['rows']) + 1} has begun")

    torch.manual_seed(args.seed)
    model = build_model(args.model, len(classes), pretrained="none")
    model.to(world.device, memory_format=torch.channels_last)
    augment = Augment(len(classes), seed=args.seed, magnitude=RECIPE["randaugment"][1],
                      mixup=RECIPE["mixup"], cutmix=RECIPE["cutmix"])
    base_lr = args.lr * sampler.global_batch / 256
    trainer = Trainer(
        model, make_sgd(model, lr=base_lr, weight_decay=args.weight_decay), world,
        config["precision"], augment, label_smoothing=args.label_smoothing)
    progress = restore(trainer, state) if state else Progress()
    if args.compile:
        model.compile()

    total = args.epochs * sampler.steps_per_epoch
    warmup = warmup_steps(args.warmup_epochs, steps_per_epoch=sampler.steps_per_epoch,
                          total_steps=total)
    loading = {"workers": min(args.workers, usable_cpus()), "worker_init": ignore_stop_signals,
               "pin_memory": world.device.type == "cuda"}
    if world.main:
        announce(config, sampler, len(val), model, base_lr, total, warmup, loading["workers"])
    transform = TrainTransform(args.img_size, scale=tuple(RECIPE["crop_scale"]),
                               num_ops=RECIPE["randaugment"][0])
    val_batches, rounds = eval_batches(
        EvalSet(val, EvalTransform(args.img_size)), batch_size=args.batch_size,
        rank=world.rank, world=world.size, **loading)
    Run(
        trainer, progress, folder, stop,
        steps_from=lambda first: train_steps(TrainSet(train, transform, args.seed), sampler,
                                             first=first, last=total, **loading),
        validate=lambda between: evaluate(trainer, val_batches, normalise, rounds=rounds,
                                          name_of=val.name, between=between)[0],
        lr_of=lambda step: lr_at(step, base=base_lr, total_steps=total, warmup_steps=warmup),
        epochs=args.epochs, steps_per_epoch=sampler.steps_per_epoch, name_of=train.name,
        frozen={"config": config, "classes": classes, "images": len(train)},
        resume_with=shlex.join(["--data_dir", str(args.data_dir), "--resume",
                                str(folder.path / LATEST)]),
        save_seconds=60 * args.save_minutes,
    ).fit()
    if world.main:
        export(args, config, model, progress.rows, classes)
    stop_processes()


def claim(folder: Folder, args) -> None:
    """Lock the checkpoint folder; RunError where it holds a run that is not the one resumed."""
    folder.lock()
    try:
        args.weights_dir.mkdir(parents=True, exist_ok=True)  # now, not after twelve days
    except OSError as error:
        raise RunError(f"--weights_dir {args.weights_dir}: {error.strerror}") from error
    resumed_here = args.resume and args.resume.parent.resolve() == folder.path.resolve()
    if resumed_here or not folder.holds_run():
        return
    if not args.overwrite:
        raise RunError(f"{folder.path} holds a run: --resume {folder.path / LATEST} goes on with "
                       "it, --overwrite sets it aside, another --checkpoint_dir leaves it alone")
    aside = folder.set_aside(folder.path / f"overwritten-{time.strftime('%Y%m%d-%H%M%S')}")
    print(f"--overwrite: the run in {folder.path} now lies in {aside}", flush=True)


def make_config(args, state: dict | None, world: World) -> dict:
    """What the checkpoint says of its run; of a run that begins, its flags and its processes."""
    if state:
        return {**state["config"], "epochs": args.epochs}
    return {**{name: getattr(args, name) for name in RUN_FLAGS}, **RECIPE,
            "precision": choose_precision(world.device, args.amp),
            "micro_batches": world.size, "run": secrets.token_hex(8)}


def share_out(images: int, config: dict, world: World) -> StepSampler:
    """The order of samples; RunError where the run's micro-batches cannot be shared evenly."""
    micro_batches = config["micro_batches"]
    if micro_batches % world.size:
        raise RunError(f"the run has {micro_batches} micro-batches of {config['batch_size']} a "
                       f"step, which {world.size} processes cannot share evenly: use a number of "
                       f"processes that divides {micro_batches}")
    if images < micro_batches:
        raise RunError(f"--data_dir has {images} training images, fewer than the "
                       f"{micro_batches} processes: use fewer")
    sampler = StepSampler(images, seed=config["seed"], micro_batch=config["batch_size"],
                          micro_batches=micro_batches, rank=world.rank, world=world.size)
    if sampler.micro_batch == 1 and config["img_size"] <= 32:
        raise RunError("BatchNorm needs more than one value a channel: use a --batch_size above 1, "
                       "or an --img_size above 32")
    return sampler


def check_same_data(state: dict, args, classes: list[str], images: int) -> None:
    if (state["classes"], state["images"]) != (classes, images):
        raise RunError(
            f"--data_dir {args.data_dir} has {len(classes)} classes and {images} training images; "
            f"{args.resume} was trained on {len(state['classes'])} classes and {state['images']} "
            "images" + (" of other names" if len(classes) == len(state["classes"]) else ""))


def announce(config, sampler, val_images, model, base_lr, total, warmup, workers) -> None:
    """Say what is about to happen, in the lines that one compares between runs."""
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{config['model']}: {parameters:,} parameters, {model.fc.out_features} classes, "
          f"{sampler.images:,} training and {val_images:,} validation images")
    print(f"global batch {sampler.global_batch} ({sampler.micro_batches} × {sampler.micro_batch}), "
          f"lr {base_lr:g} ({config['lr']:g} × {sampler.global_batch} / 256), {config['epochs']} "
          f"epochs of {sampler.steps_per_epoch} steps, {config['precision']}, {workers} workers a "
          "process")
    if sampler.micro_batch < config["batch_size"]:
        print(f"the training set is smaller than a batch of {config['batch_size']} a process: "
              f"each epoch is one step of {sampler.global_batch} images")
    if warmup < round(config["warmup_epochs"] * sampler.steps_per_epoch):
        print(f"--warmup_epochs {config['warmup_epochs']:g} is not shorter than the run: the "
              f"warm-up is a tenth of it, {warmup} of {total} steps")
    print(end="", flush=True)


def export(args, config: dict, model: torch.nn.Module, rows: list[dict], classes: list[str]):
    """Write the last epoch's weights and their JSON into both folders, byte for byte the same."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    bad = first_nonfinite(state)
    if bad:
        raise Diverged(f"{bad} is not finite: the weights were not written")
    weights = serialise(state)
    about = {
        "model": args.model, "parameters": sum(p.numel() for p in model.parameters()),
        "classes": len(classes), "class_names": classes, "epochs": len(rows),
        "top1": rows[-1]["val_top1"], "top5": rows[-1]["val_top5"], "img_size": args.img_size,
        "recipe": config, "seed": args.seed, **provenance(), "sha256": sha256(weights),
    }
    name = f"{args.model}_imagenet.pt"
    for folder in (args.checkpoint_dir, args.weights_dir):
        folder.mkdir(parents=True, exist_ok=True)
        make_way(folder / name, config["run"])
        write_atomic(folder / name, weights)
        write_json((folder / name).with_suffix(".json"), about)
        print(f"wrote {folder / name}", flush=True)
    Folder(args.checkpoint_dir).status("finished", epoch=len(rows))


def make_way(path: Path, run: str) -> None:
    """Rename a weights file that another run wrote, with its JSON, by the date it was written."""
    about = path.with_suffix(".json")
    if not path.exists():
        return
    try:
        if json.loads(about.read_text())["recipe"]["run"] == run:
            return
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no JSON, or somebody else's: not this run's
    written = time.strftime("%Y-%m-%d_%H%M%S", time.localtime(path.stat().st_mtime))
    old = path.with_name(f"{path.stem}.{written}{path.suffix}")
    while old.exists():
        old = old.with_name(f"{old.stem}+{path.suffix}")
    path.rename(old)
    if about.exists():
        about.rename(old.with_suffix(".json"))
    print(f"{path} was another run's: it is now {old}", flush=True)


if __name__ == "__main__":
    run(main, DataError, ModelError)
