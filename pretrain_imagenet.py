"""Pretrain a network on ImageNet, or on any tree of class folders, and write its weights.

  one GPU, or a CPU   python pretrain_imagenet.py --data_dir /path/to/imagenet
  four GPUs           torchrun --nproc_per_node=4 pretrain_imagenet.py --data_dir /path/to/imagenet
  two machines        torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d \\
                          --rdzv_endpoint=HOST:29400 pretrain_imagenet.py --data_dir ...
  go on after a stop  python pretrain_imagenet.py --data_dir ... --resume checkpoints/latest.pt

Writes latest.pt, best.pt, log.jsonl and, at the end, <model>_imagenet.pt with its .json into
--checkpoint_dir, and the last two into --weights_dir, where train.py and run_all.py find them.
"""

import os
import secrets
import shlex
from pathlib import Path

import torch

from common.cli import Parser, add_amp_flags, add_tensorboard_flag, at_least, run
from common.errors import UserError
from common.processes import ignore_stop_signals, usable_cpus
from data.imagenet import load_imagenet
from data.images import EvalSet, TrainSet, spot_check
from data.loading import eval_batches, train_steps
from data.sampling import StepSampler, seed_network
from data.splits import digest_of
from data.transforms import EvalTransform, make_augmentation, normalise
from models import MODELS, build_model
from models.resnet import set_stochastic_depth
from training.checkpoint import LATEST, PREVIOUS, load_checkpoint
from training.distributed import World, start_processes, stop_processes
from training.engine import LOSSES, Trainer, choose_precision, evaluate
from training.export import write_weights
from training.loop import Progress, Run, restore
from training.optim import OPTIMIZERS, make_schedule, warmup_steps
from training.preemption import StopRequest
from training.recipes import FLAGS, RECIPES, in_words
from training.run_dir import Folder
from training.tensorboard import Board

# What makes a run the run it is. A resumed run takes these from its checkpoint.
RUN_FLAGS = ("recipe", "model", *FLAGS, "img_size", "seed")


def make_parser() -> Parser:
    parser = Parser(description=__doc__)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data_dir",
        type=Path,
        default=Path("data/imagenet"),
        metavar="DIR",
        help="folder with train/ and val/, each of one folder of images a class",
    )
    data.add_argument(
        "--img_size",
        type=at_least(32),
        default=224,
        metavar="PX",
        help="training and validation crop",
    )
    data.add_argument(
        "--workers",
        type=at_least(0),
        default=8,
        metavar="N",
        help="loader processes per process, at most the CPUs it may use",
    )
    recipe = parser.add_argument_group("recipe", "defaults are those of the recipe guide")
    recipe.add_argument(
        "--recipe",
        default="guide",
        choices=RECIPES,
        metavar="NAME",
        help="guide, or a1 for timm's A1, in steps of 2048 images whatever the "
        "--batch_size (pip install timm)",
    )
    recipe.add_argument(
        "--model",
        default="twistnet18",
        choices=MODELS,
        metavar="NAME",
        help=f"one of {', '.join(MODELS)}",
    )
    recipe.add_argument("--epochs", type=at_least(1), metavar="N", help="epochs")
    recipe.add_argument(
        "--batch_size",
        type=at_least(1),
        metavar="B",
        help="images a process and step; with a1, at a time",
    )
    recipe.add_argument(
        "--lr",
        type=at_least(0, float),
        metavar="LR",
        help="learning rate for 256 images, times global batch / 256; with a1, as it is",
    )
    recipe.add_argument(
        "--weight_decay",
        type=at_least(0, float),
        metavar="WD",
        help="of convolutions and linear layers; none on norms, biases, gates",
    )
    recipe.add_argument(
        "--warmup_epochs",
        type=at_least(0, float),
        metavar="N",
        help="linear warm-up before the cosine",
    )
    recipe.add_argument(
        "--label_smoothing", type=at_least(0, float), metavar="E", help="kept on mixed targets"
    )
    recipe.add_argument(
        "--clip_norm",
        type=at_least(0, float),
        metavar="N",
        help="largest gradient norm of a step; larger ones are scaled down to it; 0: no clipping",
    )
    recipe.add_argument(
        "--seed",
        type=at_least(0),
        default=42,
        metavar="S",
        help="of initial weights, order and augmentation",
    )
    parser.set_defaults(**{name: RECIPES["guide"][name] for name in FLAGS})
    add_amp_flags(parser.add_argument_group("speed")).add_argument(
        "--compile", action="store_true", help="torch.compile the network"
    )
    files = parser.add_argument_group("files")
    files.add_argument(
        "--checkpoint_dir",
        type=Path,
        default=Path("checkpoints"),
        metavar="DIR",
        help="one run's checkpoints and log; one folder holds one run",
    )
    files.add_argument(
        "--weights_dir",
        type=Path,
        default=Path("weights"),
        metavar="DIR",
        help="where the final weights are written and found",
    )
    files.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="checkpoint to go on from, in its folder; 'auto': latest.pt of "
        "--checkpoint_dir if there is one",
    )
    files.add_argument(
        "--overwrite",
        action="store_true",
        help="start anew where a run lies: its files are set aside",
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


def parse_args(argv: list[str] | None = None):
    """The flags, and the checkpoint's state where the run is resumed, with its flags adopted."""
    parser = make_parser()
    args, given = parser.parse_args(argv), parser.given(argv)
    for name in set(FLAGS) - given:
        setattr(args, name, RECIPES[args.recipe][name])
    if args.label_smoothing >= 1:
        raise UserError("--label_smoothing must be below 1")
    if args.resume and args.overwrite:
        raise UserError("--resume goes on with a run, --overwrite starts anew: give one of them")
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
    """Take the run's flags from its checkpoint; UserError for a given one that contradicts it."""
    config = state["config"]
    # The first checkpoints name no recipe, and those of before clipping no clip_norm.
    needed = {*RUN_FLAGS, "micro_batches"} - {"recipe", "clip_norm"}
    if not isinstance(config, dict) or not config.keys() >= needed:
        raise UserError(f"{args.resume} is no checkpoint of pretrain_imagenet.py")
    config = state["config"] = {"recipe": "guide", **RECIPES["guide"], "clip_norm": 0, **config}
    if args.amp is not None and args.amp != (config["precision"] != "fp32"):
        raise UserError(
            f"--{'amp' if args.amp else 'no_amp'} contradicts {args.resume}, which was "
            f"made in {config['precision']}: leave the flag out"
        )
    for name in RUN_FLAGS:
        if name not in given:
            setattr(args, name, config[name])
        elif name != "epochs" and getattr(args, name) != config[name]:
            raise UserError(
                f"--{name} {getattr(args, name)} contradicts {args.resume}, which was "
                f"made with {config[name]}: leave the flag out, or start a new run in "
                "another --checkpoint_dir"
            )
    if args.epochs < len(state["rows"]):
        raise UserError(
            f"--epochs {args.epochs} is less than the {len(state['rows'])} epochs that "
            f"{args.resume} has trained"
        )


def main(argv: list[str] | None = None) -> None:
    args, state = parse_args(argv)
    board = Board(args.checkpoint_dir, wanted=args.tensorboard)
    train, val, classes = load_imagenet(args.data_dir)
    spot_check(val)
    folder = Folder(args.checkpoint_dir)
    world = start_processes()
    stop = StopRequest()
    config = make_config(args, state, world)
    transform, augment = make_augmentation(
        config, size=args.img_size, seed=args.seed, num_classes=len(classes)
    )
    if world.main:
        claim(folder, args)
    sampler = share_out(len(train), config, world)
    digest = digest_of(classes, {"train": train})
    if state:
        check_same_data(state, args, classes, len(train), digest)
        if state["step"] > args.epochs * sampler.steps_per_epoch:
            raise UserError(
                f"--epochs {args.epochs} is less than {args.resume} has trained: its "
                f"epoch {len(state['rows']) + 1} has begun"
            )

    torch.manual_seed(args.seed)
    model = build_model(args.model, len(classes))
    base_lr = args.lr
    if config["lr_images"]:
        base_lr = args.lr * sampler.global_batch / config["lr_images"]
    trainer = make_trainer(config, model, world, augment, lr=base_lr)
    progress = restore(trainer, state) if state else Progress()
    if len(set(world.gather(progress.step))) > 1:  # one fell back, or a dying run saved in between
        raise UserError(f"the ranks have read different states of {args.resume}: start them again")
    if args.compile:
        model.compile()

    total = args.epochs * sampler.steps_per_epoch
    warmup = warmup_steps(
        args.warmup_epochs, steps_per_epoch=sampler.steps_per_epoch, total_steps=total
    )
    loading = {
        "workers": min(args.workers, usable_cpus()),
        "worker_init": ignore_stop_signals,
        "pin_memory": world.device.type == "cuda",
    }
    if world.main:
        announce(config, sampler, len(val), model, base_lr, total, warmup, loading["workers"])
    val_batches, rounds = eval_batches(
        EvalSet(val, EvalTransform(args.img_size, config["test_resize"])),
        batch_size=args.batch_size,
        rank=world.rank,
        world=world.size,
        **loading,
    )
    Run(
        trainer,
        progress,
        folder,
        stop,
        steps_from=lambda first: train_steps(
            TrainSet(train, transform, args.seed), sampler, first=first, last=total, **loading
        ),
        validate=lambda between: evaluate(
            trainer, val_batches, normalise, rounds=rounds, name_of=val.file_name, between=between
        )[0],
        lr_of=make_schedule(config, base=base_lr, total_steps=total, warmup_steps=warmup),
        epochs=args.epochs,
        steps_per_epoch=sampler.steps_per_epoch,
        name_of=train.file_name,
        frozen={"config": config, "classes": classes, "images": len(train), "data": digest},
        resume_with=resume_command(args, world),
        follow=board,
        save_seconds=60 * args.save_minutes,
    ).fit()
    if world.main:
        export(args, config, model, progress.rows, classes)
        folder.status("finished", epoch=args.epochs)
    stop_processes()


def resume_command(args, world: World) -> str:
    words = ["python"]
    if world.size > 1:
        words = ["torchrun", f"--nproc_per_node={world.local_size}"]
    if world.size > world.local_size:
        words += [
            f"--nnodes={world.size // world.local_size}",
            "--rdzv_backend=c10d",
            "--rdzv_endpoint=HOST:PORT",
        ]
    words += [
        "pretrain_imagenet.py",
        "--data_dir",
        str(args.data_dir),
        "--resume",
        str(args.checkpoint_dir / LATEST),
    ]
    parser = make_parser()
    for name in ("workers", "weights_dir", "save_minutes"):
        if getattr(args, name) != parser.get_default(name):
            words += [f"--{name}", str(getattr(args, name))]
    words += [f"--{name}" for name in ("compile", "tensorboard") if getattr(args, name)]
    return shlex.join(words)


def claim(folder: Folder, args) -> None:
    """Lock the checkpoint folder; UserError where it holds a run that is not the one resumed."""
    folder.lock()
    try:
        args.weights_dir.mkdir(parents=True, exist_ok=True)  # now, not after twelve days
    except OSError as error:
        raise UserError(f"--weights_dir {args.weights_dir}: {error.strerror}") from error
    resumed_here = args.resume and args.resume.parent.resolve() == folder.path.resolve()
    if resumed_here or not folder.holds_run():
        return
    if not args.overwrite:
        raise UserError(
            f"{folder.path} holds a run: --resume {folder.path / LATEST} goes on with "
            "it, --overwrite sets it aside, another --checkpoint_dir leaves it alone"
        )
    aside = folder.set_aside(folder.path / "overwritten")
    print(f"--overwrite: the run in {folder.path} now lies in {aside}", flush=True)


def make_config(args, state: dict | None, world: World) -> dict:
    """What the checkpoint says of its run; of a run that begins, its flags and its processes."""
    if state:
        return {**state["config"], "epochs": args.epochs}
    recipe = RECIPES[args.recipe]
    micro_batches, left = world.size, 0
    if recipe["global_batch"]:
        micro_batches, left = divmod(recipe["global_batch"], args.batch_size)
    if left or not micro_batches:
        raise UserError(
            f"--batch_size {args.batch_size} does not divide the "
            f"{recipe['global_batch']} images of a step of --recipe {args.recipe}: use "
            "one that does, such as 256"
        )
    return {
        **recipe,
        **{name: getattr(args, name) for name in RUN_FLAGS},
        "precision": choose_precision(world.device, args.amp),
        "micro_batches": micro_batches,
        "run": secrets.token_hex(8),
    }


def make_trainer(config: dict, model: torch.nn.Module, world: World, augment, *, lr: float):
    """The network with the optimizer, the loss and the stochastic depth of its recipe."""
    set_stochastic_depth(model, config["stochastic_depth"])
    model.to(world.device, memory_format=torch.channels_last)
    make_optimizer = OPTIMIZERS[config["optimizer"]]
    return Trainer(
        model,
        make_optimizer(model, lr=lr, weight_decay=config["weight_decay"]),
        world,
        config["precision"],
        augment,
        label_smoothing=config["label_smoothing"],
        clip_norm=config["clip_norm"] or None,
        loss=LOSSES[config["loss"]],
        seed_forward=lambda step, micro: seed_network(config["seed"], step, micro, 2),
    )


def share_out(images: int, config: dict, world: World) -> StepSampler:
    """The order of samples; UserError where the run's micro-batches cannot be shared evenly."""
    micro_batches = config["micro_batches"]
    if micro_batches % world.size:
        raise UserError(
            f"the run has {micro_batches} micro-batches of {config['batch_size']} a "
            f"step, which {world.size} processes cannot share evenly: use a number of "
            f"processes that divides {micro_batches}"
            + (", or a smaller --batch_size" if config["global_batch"] else "")
        )
    if images < micro_batches:
        raise UserError(
            f"--data_dir has {images} training images, fewer than the {micro_batches} "
            "micro-batches of a step: use fewer processes"
            + (", or a larger --batch_size" if config["global_batch"] else "")
        )
    sampler = StepSampler(
        images,
        seed=config["seed"],
        micro_batch=config["batch_size"],
        micro_batches=micro_batches,
        rank=world.rank,
        world=world.size,
        repeats=config["repeats"],
    )
    if sampler.micro_batch == 1 and config["img_size"] <= 32:
        raise UserError(
            "BatchNorm needs more than one value a channel: use a --batch_size above 1, "
            "or an --img_size above 32"
        )
    return sampler


def check_same_data(state: dict, args, classes: list[str], images: int, digest: str) -> None:
    """UserError unless the training images are those of the checkpoint, by class and name."""
    old = state["classes"], state["images"], state.get("data", digest)  # not in the first ones
    if old != (classes, images, digest):
        raise UserError(
            f"--data_dir {args.data_dir} has {len(classes)} classes and {images} training images; "
            f"{args.resume} was trained on {len(state['classes'])} classes and {state['images']} "
            "images" + (" of other names" if len(classes) == len(state["classes"]) else "")
        )


def announce(config, sampler, val_images, model, base_lr, total, warmup, workers) -> None:
    """Say what is about to happen, in the lines that one compares between runs."""
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{config['model']}: {parameters:,} parameters, {model.fc.out_features} classes, "
        f"{sampler.images:,} training and {val_images:,} validation images"
    )
    print(
        f"recipe {config['recipe']}: "
        + in_words({name: config[name] for name in RECIPES[config["recipe"]]})
    )
    lr = f"lr {base_lr:g}"
    if config["lr_images"]:
        lr += f" ({config['lr']:g} × {sampler.global_batch} / {config['lr_images']})"
    print(
        f"global batch {sampler.global_batch} ({sampler.micro_batches} × {sampler.micro_batch}), "
        f"{lr}, {config['epochs']} epochs of {sampler.steps_per_epoch} steps, "
        f"{config['precision']}, {workers} workers a process"
    )
    if sampler.micro_batch < config["batch_size"]:
        print(
            f"the training set is smaller than a batch of {config['batch_size']} a process: "
            f"each epoch is one step of {sampler.global_batch} images"
        )
    if warmup < round(config["warmup_epochs"] * sampler.steps_per_epoch):
        print(
            f"--warmup_epochs {config['warmup_epochs']:g} is not shorter than the run: the "
            f"warm-up is a tenth of it, {warmup} of {total} steps"
        )
    print(end="", flush=True)


def export(args, config: dict, model: torch.nn.Module, rows: list[dict], classes: list[str]):
    """Write the last epoch's weights into both folders."""
    about = {
        "model": args.model,
        "classes": len(classes),
        "class_names": classes,
        "epochs": len(rows),
        "top1": rows[-1]["val_top1"],
        "top5": rows[-1]["val_top5"],
        "img_size": args.img_size,
        "recipe": config,
        "seed": args.seed,
    }
    write_weights(model, about, f"{args.model}_imagenet", [args.checkpoint_dir, args.weights_dir])


if __name__ == "__main__":
    run(main)
