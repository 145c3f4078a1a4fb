"""Pretrain a network on ImageNet, or on any tree of class folders, and export its weights.

  one GPU, or a CPU      python pretrain_imagenet.py --data_dir /path/to/imagenet
  four GPUs              torchrun --nproc_per_node=4 pretrain_imagenet.py \\
                             --data_dir /path/to/imagenet
  two machines           torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d \\
                             --rdzv_endpoint=HOST:29400 pretrain_imagenet.py --data_dir ...
  resume after a stop    the same command again, or
                         python pretrain_imagenet.py --data_dir ... --resume checkpoints/latest.pt

Writes latest.pt, best.pt, log.jsonl and, at the end, <model>_imagenet.pt with its .json into
--checkpoint_dir, and the last two also into --weights_dir, where train.py and run_all.py find them.
"""

import argparse
import math
import secrets
import shlex
from pathlib import Path

import torch

from common.cli import Parser, add_amp_flags, add_saving_flags, at_least, run
from common.errors import UserError
from common.files import ROOT, try_writing_beside
from common.processes import read_integer
from data.imagenet import load_imagenet
from data.images import EvalSet, ImageFiles, TrainSet, spot_check
from data.loading import EvalLoader, TrainLoader
from data.packed import MANIFEST, read_manifest
from data.sampling import StepSampler, check_batch_norm, seed_network
from data.splits import digest_of
from data.transforms import Augment, list_train_sizes, make_augmentation, make_eval_transform
from models import add_model_flag, build_model, has_fixed_size
from models.timm_models import check_takes_images, is_timm
from models.twistnet import read_gates
from models.weights import weights_stem
from training.checkpoint import LATEST, TrainState, has_checkpoint, load_tensors, require_checkpoint
from training.distributed import DistributedContext, init_distributed, shut_down_distributed
from training.engine import LOSSES, Evaluator, Trainer, check_precision, choose_precision
from training.export import write_weights
from training.loop import TrainLoop
from training.optim import count_warmup_steps, make_optimizer, make_schedule
from training.preemption import StopRequest
from training.recipes import FLAGS, PRETRAIN, describe_recipe, upgrade_pretrain_config
from training.resuming import (
    check_same_data,
    copy_best,
    describe_resumed,
    find_branch,
    find_changed_settings,
    is_branch,
    load_run,
    prepare_checkpoint_dir,
)
from training.run_dir import RunDir
from training.tensorboard import TensorBoardLogger

# What makes two runs the same run; a resumed run takes these from its checkpoint.
RUN_FLAGS = ("recipe", "model", *FLAGS, "img_size", "seed")


def make_parser() -> Parser:
    parser = Parser(prog="pretrain_imagenet.py", description=__doc__)
    add_data_flags(parser.add_argument_group("data"))
    add_recipe_flags(parser.add_argument_group("recipe", "defaults are those of the chosen recipe"))
    parser.set_defaults(**{name: PRETRAIN["guide"][name] for name in FLAGS})
    add_amp_flags(parser.add_argument_group("speed")).add_argument(
        "--compile", action="store_true", help="compile the network with torch.compile"
    )
    add_file_flags(parser.add_argument_group("files"))
    return parser


def add_data_flags(group) -> None:
    group.add_argument(
        "--data_dir",
        type=Path,
        default=Path("data/imagenet"),
        metavar="DIR",
        help="folder with train/ and val/, each with one folder of images per class; or a folder "
        "packed by tools.pack",
    )
    group.add_argument(
        "--img_size",
        type=at_least(32),
        default=224,
        metavar="PX",
        help="side of the training and validation crop, in pixels; --recipe fast trains on smaller "
        "crops",
    )
    group.add_argument(
        "--workers",
        type=at_least(0),
        default=8,
        metavar="N",
        help="loader workers per process, at most one per CPU core; raise it if training waits for "
        "data",
    )


def add_recipe_flags(group) -> None:
    group.add_argument(
        "--recipe",
        default="guide",
        choices=PRETRAIN,
        metavar="NAME",
        help="guide: the recipe of the authors' pretraining guide; fast: 88 epochs with growing "
        "image sizes; a1: timm's A1, steps of 2048 images by accumulation (pip install timm)",
    )
    add_model_flag(group)
    group.add_argument(
        "--epochs",
        type=at_least(1),
        metavar="N",
        help="number of training epochs; with --resume it may differ from the run's",
    )
    group.add_argument(
        "--batch_size",
        type=at_least(1),
        metavar="B",
        help="images per GPU per step (with --recipe a1: per micro-batch); lower it if you run out "
        "of memory",
    )
    group.add_argument(
        "--lr",
        type=at_least(0, float),
        metavar="LR",
        help="learning rate for a global batch of 256, scaled linearly with it (with --recipe a1: "
        "used as it is)",
    )
    group.add_argument(
        "--weight_decay",
        type=at_least(0, float),
        metavar="WD",
        help="weight decay of convolutions and linear layers; norms, biases and gates have none "
        "(with --recipe fast: multiplied by 1,281,167 / number of training images)",
    )
    group.add_argument(
        "--warmup_epochs",
        type=at_least(0, float),
        metavar="N",
        help="epochs of linear warm-up of the learning rate",
    )
    group.add_argument(
        "--label_smoothing",
        type=at_least(0, float),
        metavar="E",
        help="label smoothing, also applied to MixUp and CutMix targets",
    )
    group.add_argument(
        "--clip_norm",
        type=at_least(0, float),
        metavar="N",
        help="largest gradient norm of a step, to which larger ones are scaled down; 0 disables it",
    )
    group.add_argument(
        "--seed",
        type=at_least(0),
        default=42,
        metavar="S",
        help="seed of the initial weights, the data order and the augmentation",
    )


def add_file_flags(group) -> None:
    group.add_argument(
        "--checkpoint_dir",
        type=Path,
        default=Path("checkpoints"),
        metavar="DIR",
        help="folder of this run's checkpoints and log, one per run; with --resume FILE alone, the "
        "folder of FILE",
    )
    group.add_argument(
        "--weights_dir",
        type=Path,
        default=Path("weights"),
        metavar="DIR",
        help="folder where the final weights are written, and where train.py finds them",
    )
    group.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="checkpoint to resume with its own settings, as a branch if --checkpoint_dir is "
        "another folder; 'auto': latest.pt of --checkpoint_dir if it exists, else a new run",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="archive the run that is in --checkpoint_dir and start a new one",
    )
    add_saving_flags(group)


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, set[str]]:
    """The flags, with the recipe's defaults, and the names of those that were given."""
    parser = make_parser()
    args = parser.parse_args(argv)
    given = parser.given

    # The recipe's values for flags that were not given.
    for name in set(FLAGS) - given:
        setattr(args, name, PRETRAIN[args.recipe][name])

    # Values that do not go together.
    if args.label_smoothing >= 1:
        raise UserError("--label_smoothing must be below 1")
    global_batch = PRETRAIN[args.recipe]["global_batch"]
    if global_batch and global_batch % args.batch_size:
        raise UserError(
            f"--batch_size {args.batch_size} does not divide the {global_batch} images per step "
            f"of --recipe {args.recipe}: use one that does, such as 256"
        )
    if PRETRAIN[args.recipe].get("train_sizes") and has_fixed_size(args.model):
        raise UserError(
            f"--recipe {args.recipe} trains on images of several sizes and {args.model} takes a "
            "single one: use another --recipe"
        )
    if args.resume and args.overwrite:
        raise UserError("--resume continues a run and --overwrite starts a new one: use only one")
    if args.overwrite and read_integer("TORCHELASTIC_RESTART_COUNT", 0):
        raise UserError(
            "torchrun has restarted this run, and --overwrite would archive what it has trained: "
            "start it again without --overwrite, which resumes it"
        )
    restarts = read_integer("TORCHELASTIC_MAX_RESTARTS", 0)
    if args.overwrite and restarts and read_integer("GROUP_WORLD_SIZE", 1) > 1:
        raise UserError(
            "--overwrite and --max_restarts on several machines: a restart could archive what has "
            "been trained: leave one of them out"
        )

    # What --resume stands for.
    if args.resume == Path("auto"):
        args.resume = args.checkpoint_dir / LATEST if has_checkpoint(args.checkpoint_dir) else None
        given.add("resume")  # whatever was found: with the checkpoint's settings
    elif args.resume and "checkpoint_dir" not in given:
        args.checkpoint_dir = args.resume.parent
    if args.resume:
        try:
            require_checkpoint(args.resume)
        except UserError as error:
            if not has_checkpoint(args.checkpoint_dir):
                raise
            raise UserError(
                f"{error}; to continue the run that is in {args.checkpoint_dir}: --resume "
                f"{args.checkpoint_dir / LATEST}"
            ) from error
    return args, given


def main(argv: list[str] | None = None) -> None:
    # Flags.
    args, given = parse_args(argv)
    loggers = [TensorBoardLogger(args.checkpoint_dir)] if args.tensorboard else []

    # Data.
    train, val, classes = load_imagenet(args.data_dir)
    spot_check(val)

    # Processes, and the run's folder.
    context = init_distributed()
    stop = StopRequest()
    run_dir = RunDir(args.checkpoint_dir)
    args.resume = find_branch(args.resume, args.checkpoint_dir)
    if context.is_main:
        prepare_checkpoint_dir(run_dir, args.resume, overwrite=args.overwrite)
    context.barrier()

    # The state: of a new run, or of the one to resume.
    state, tensors, sampler = open_state(args, given, train, val, classes, context)
    config = state.config
    if context.is_main:
        make_weights_dir(args.weights_dir)
    if state.epoch < args.epochs:
        check_precision(context.device, config["precision"])
    with run_dir.recording_failure(active=context.is_main):
        # Loaders.
        val_loader = make_val_loader(val, args, config, context)
        train_loader, augment = make_train_loader(train, classes, sampler, args, config)

        # The network, and what trains it.
        torch.manual_seed(args.seed)
        model = build_model(
            args.model,
            len(classes),
            img_size=args.img_size,
            stochastic_depth=config["stochastic_depth"],
        )
        check_train_sizes(model, config)
        schedule = make_schedule_settings(args, config, sampler)
        trainer = make_trainer(
            config,
            model,
            context,
            augment,
            lr=schedule["base"],
            weight_decay=scale_weight_decay(config, len(train)),
        )
        if tensors:
            load_tensors(trainer, tensors)
            tensors.clear()  # the host's copy, which nobody needs any more
        if config.get("train_sizes"):
            trainer.try_memory(sampler.micro_batch, max(list_train_sizes(config)))
        if args.compile:
            compile_network(model)
        if context.is_main:
            warn_of_small_images(args.data_dir, config)
            print_run_summary(
                config, sampler, len(val), state, model, train_loader.workers, **schedule
            )
            if is_branch(args.resume, args.checkpoint_dir):
                copy_best(state, args.resume.parent, args.checkpoint_dir)

        # Training.
        TrainLoop(
            trainer,
            train_loader,
            Evaluator(val_loader, context, config["precision"]),
            lr_schedule=make_schedule(config, **schedule),
            epochs=args.epochs,
            run_dir=run_dir,
            stop=stop,
            resume_command=make_resume_command(args, context),
            loggers=loggers,
            extra_columns=lambda: read_gates(model),
            save_seconds=60 * args.save_minutes,
            validate_every=count_validation_interval(config, len(train), len(val)),
        ).fit(state)

        # The weights.
        if context.is_main:
            export(args, state, model, len(val))
            run_dir.write_status("finished", epoch=args.epochs)
    shut_down_distributed()


# ---------------------------------------------------------------- resuming


def open_state(
    args: argparse.Namespace,
    given: set[str],
    train: ImageFiles,
    val: ImageFiles,
    classes: list[str],
    context: DistributedContext,
) -> tuple[TrainState, dict[str, dict], StepSampler]:
    """The state, the tensors (none for a new run) and the data order.

    Puts a resumed run's flags into args.
    """
    digest = digest_of(classes, {"train": train})
    val_digest = digest_of(classes, {"val": val})
    resumed = load_run(args.resume, args.checkpoint_dir, context)
    if resumed is None:
        config = {**make_config(args, context), "val_data": val_digest}
        record_weights_dir(args, given, config)
        check_ranks_agree(config, digest, val_digest, context)
        state = TrainState(config, classes, len(train), data_digest=digest)
        return state, {}, make_sampler(len(train), config, context)
    state, tensors, path = resumed
    epochs = state.config.get("epochs", 0)
    restore_flags(args, given, state, path)
    record_weights_dir(args, given, state.config)
    check_same_data(state, classes, len(train), digest, args.data_dir)
    check_ranks_agree(state.config, digest, val_digest, context)
    state.data_digest = digest
    sampler = make_sampler(len(train), state.config, context)
    check_epochs(state, sampler.steps_per_epoch)
    if context.is_main:
        print(describe_resumed(state, path, args.epochs))
        if state.step == args.epochs * sampler.steps_per_epoch and args.epochs < epochs:
            lr = tensors["optimizer"]["param_groups"][0]["lr"]
            print(
                f"warning: the run was meant to have {epochs} epochs, and its learning rate is "
                f"still {lr:.3g}: that of a run of {args.epochs} epochs would be near zero"
            )
        if state.config.get("val_data", val_digest) != val_digest:
            print(
                f"warning: --data_dir {args.data_dir} has other validation images than the run had "
                "before: its accuracies, and which epoch is the best, cannot be compared"
            )
    state.config["val_data"] = val_digest
    return state, tensors, sampler


def check_ranks_agree(
    config: dict, digest: str, val_digest: str, context: DistributedContext
) -> None:
    """Raise UserError where the ranks would train on different images or in different ways."""
    own = {name: config[name] for name in (*RUN_FLAGS, "precision")}
    own = {**own, "training images": digest, "validation images": val_digest}
    values = context.gather(own)
    different = [name for name in own if any(each[name] != values[0][name] for each in values)]
    if different:
        raise UserError(
            f"the ranks differ in {', '.join(different)}: every machine needs the same command, "
            "the same files in --data_dir and GPUs with the same precision"
        )


def check_epochs(state: TrainState, steps_per_epoch: int) -> None:
    """Raise UserError where the run has trained for longer than --epochs."""
    epochs = state.config["epochs"]
    if state.step > epochs * steps_per_epoch:
        trained = f"it has finished {state.epoch}"
        if state.step > state.epoch * steps_per_epoch:
            trained = f"its epoch {state.epoch + 1} has begun"
        raise UserError(f"--epochs {epochs} is less than the run has trained: {trained}")


def restore_flags(args: argparse.Namespace, given: set[str], state: TrainState, path: Path) -> None:
    """Put the run's own settings into args; UserError where the command line contradicts them.

    With --resume only flags that were given can contradict, and --epochs may change. Without it
    the same command is expected: the defaults count as well, as far as the checkpoint has them.
    """
    explicit = "resume" in given
    compared = given if explicit else given | state.config.keys()
    changed = find_changed_settings(
        state.config,
        {name: getattr(args, name) for name in RUN_FLAGS if name in compared},
        amp=args.amp,
        ignore={"epochs"} if explicit else set(),
    )
    if changed and explicit:
        raise UserError(
            f"{path} was made with other settings than the command line's ({'; '.join(changed)}): "
            "leave these flags out, or start a new run in another --checkpoint_dir"
        )
    if changed:
        raise UserError(
            f"{args.checkpoint_dir} already contains a run with other settings "
            f"({'; '.join(changed)}): resume it with its own by --resume {path}, archive it with "
            "--overwrite, or choose another --checkpoint_dir"
        )
    state.config = upgrade_pretrain_config(state.config)
    if "epochs" in given and args.epochs != state.config["epochs"]:
        earlier = state.config.get("earlier_epochs", [])
        state.config["earlier_epochs"] = [*earlier, state.config["epochs"]]
    for name in RUN_FLAGS:
        if not (name == "epochs" and "epochs" in given):
            setattr(args, name, state.config[name])
    state.config["epochs"] = args.epochs


def record_weights_dir(args: argparse.Namespace, given: set[str], config: dict) -> None:
    """Keep a --weights_dir that was given for when the run is resumed without the flag.

    It is recorded as a full path, or as "." where it is the folder of the checkpoints.
    """
    if "weights_dir" in given:
        same = args.weights_dir.resolve() == args.checkpoint_dir.resolve()
        config["weights_dir"] = "." if same else str(args.weights_dir.resolve())
    elif is_branch(args.resume, args.checkpoint_dir):
        config.pop("weights_dir", None)
    elif "weights_dir" in config:
        args.weights_dir = args.checkpoint_dir / config["weights_dir"]  # a full path stays itself


def make_resume_command(args: argparse.Namespace, context: DistributedContext) -> str:
    words = ["python"]
    if context.world_size > 1:
        words = ["torchrun", f"--nproc_per_node={context.local_world_size}"]
    if context.world_size > context.local_world_size:
        words += [
            f"--nnodes={context.world_size // context.local_world_size}",
            "--rdzv_backend=c10d",
            "--rdzv_endpoint=HOST:PORT",
        ]
    script = "pretrain_imagenet.py" if Path.cwd() == ROOT else str(ROOT / "pretrain_imagenet.py")
    words += [script, "--data_dir", str(args.data_dir)]
    words += ["--resume", str(args.checkpoint_dir / LATEST)]
    parser = make_parser()
    for name in ("workers", "weights_dir", "save_minutes"):
        if getattr(args, name) != parser.get_default(name):
            words += [f"--{name}", str(getattr(args, name))]
    words += [f"--{name}" for name in ("compile", "tensorboard") if getattr(args, name)]
    return shlex.join(words)


# ---------------------------------------------------------------- parts of a run


def make_config(args: argparse.Namespace, context: DistributedContext) -> dict:
    """The configuration of a new run: its recipe, flags, precision and number of micro-batches."""
    recipe = PRETRAIN[args.recipe]
    micro_batches = context.world_size
    if recipe["global_batch"]:
        micro_batches = recipe["global_batch"] // args.batch_size
    return {
        **recipe,
        **{name: getattr(args, name) for name in RUN_FLAGS},
        "precision": choose_precision(context.device, args.amp),
        "micro_batches": micro_batches,
        "run": secrets.token_hex(8),
    }


def make_sampler(num_images: int, config: dict, context: DistributedContext) -> StepSampler:
    """The data order; UserError where the ranks cannot share the run's micro-batches evenly."""
    micro_batches, batch_size = config["micro_batches"], config["batch_size"]
    if micro_batches % context.world_size:
        advice = ", or start a new run in another --checkpoint_dir"
        if config["global_batch"]:
            advice = ", or a smaller --batch_size"
        raise UserError(
            f"the run has {micro_batches} micro-batches of {batch_size} images per step, which "
            f"{context.world_size} processes cannot share evenly: use a number of processes that "
            f"divides {micro_batches}{advice}"
        )
    if num_images < micro_batches:
        advice = "use a larger --batch_size" if config["global_batch"] else "use fewer processes"
        raise UserError(
            f"--data_dir has {num_images} training images, fewer than the {micro_batches} "
            f"micro-batches per step: {advice}, or add images"
        )
    sampler = StepSampler(
        num_images,
        seed=config["seed"],
        micro_batch=batch_size,
        micro_batches=micro_batches,
        rank=context.rank,
        world_size=context.world_size,
        repeats=config["repeats"],
    )
    check_batch_norm(sampler, batch_size, min(list_train_sizes(config)))
    return sampler


def make_val_loader(
    val: ImageFiles, args: argparse.Namespace, config: dict, context: DistributedContext
) -> EvalLoader:
    return EvalLoader(
        EvalSet(val, make_eval_transform(config)),
        batch_size=args.batch_size,
        workers=args.workers,
        rank=context.rank,
        world_size=context.world_size,
    )


def make_train_loader(
    train: ImageFiles,
    classes: list[str],
    sampler: StepSampler,
    args: argparse.Namespace,
    config: dict,
) -> tuple[TrainLoader, Augment]:
    """The loader, and the device's part of the augmentation."""
    transform, augment = make_augmentation(
        config, size=args.img_size, seed=args.seed, num_classes=len(classes)
    )
    dataset = TrainSet(train, transform, args.seed)
    return TrainLoader(dataset, sampler, workers=args.workers), augment


def count_validation_interval(config: dict, num_train_images: int, num_val_images: int) -> int:
    """Epochs from one validation to the next, as the recipe limits their share of the images."""
    share = config.get("validation_share")
    return math.ceil(num_val_images / (share * num_train_images)) if share else 1


def make_schedule_settings(
    args: argparse.Namespace, config: dict, sampler: StepSampler
) -> dict[str, float]:
    """The peak learning rate, scaled with the batch where the recipe says so, and the steps."""
    lr = args.lr
    if config["lr_images"]:
        lr = args.lr * sampler.global_batch / config["lr_images"]
    total_steps = args.epochs * sampler.steps_per_epoch
    warmup_steps = count_warmup_steps(
        args.warmup_epochs, steps_per_epoch=sampler.steps_per_epoch, total_steps=total_steps
    )
    return {"base": lr, "total_steps": total_steps, "warmup_steps": warmup_steps}


def scale_weight_decay(config: dict, num_train_images: int) -> float:
    """The weight decay of a step; a recipe can ask for more of it on fewer images."""
    images = config["weight_decay_images"]
    return config["weight_decay"] * (images / num_train_images if images else 1)


def make_trainer(
    config: dict,
    model: torch.nn.Module,
    context: DistributedContext,
    augment: Augment,
    *,
    lr: float,
    weight_decay: float,
) -> Trainer:
    """The network on its device, with the optimizer and loss of its recipe."""
    model.to(context.device, memory_format=torch.channels_last)
    return Trainer(
        model,
        make_optimizer({**config, "weight_decay": weight_decay}, model, lr=lr),
        context,
        config["precision"],
        augment,
        label_smoothing=config["label_smoothing"],
        clip_norm=config["clip_norm"] or None,
        loss=LOSSES[config["loss"]],
        seed_forward=lambda step, micro: seed_network(config["seed"], step, micro),
    )


def check_train_sizes(model: torch.nn.Module, config: dict) -> None:
    """Raise UserError where a network of timm does not take all image sizes of the run."""
    if config.get("train_sizes") and is_timm(config["model"]):
        for size in list_train_sizes(config):
            check_takes_images(model, config["model"], size)


def compile_network(model: torch.nn.Module) -> None:
    """Compile once for each shape of the images: those of training, and two of validation.

    Kernels for any shape are slower, and PyTorch makes them from the second shape on unless told
    otherwise; beyond its limit of 8 shapes it would not compile at all.
    """
    torch._dynamo.config.recompile_limit = 32
    model.compile(dynamic=False)


def print_run_summary(
    config: dict,
    sampler: StepSampler,
    num_val_images: int,
    state: TrainState,
    model: torch.nn.Module,
    workers: int,
    *,
    base: float,
    total_steps: int,
    warmup_steps: int,
) -> None:
    """Print what is about to be trained, in lines that can be compared between runs."""
    # The network and the data.
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{config['model']}: {parameters:,} parameters, {len(state.classes)} classes, "
        f"{sampler.num_images:,} training and {num_val_images:,} validation images"
    )

    # The recipe, and what its steps are.
    values = {name: config[name] for name in PRETRAIN[config["recipe"]]}
    print(f"recipe {config['recipe']}: {describe_recipe(values)}")
    lr = f"lr {base:g}"
    if config["lr_images"]:
        lr += f" ({config['lr']:g} × {sampler.global_batch} / {config['lr_images']})"
    weight_decay, decay = scale_weight_decay(config, sampler.num_images), ""
    if config["weight_decay_images"]:
        decay = (
            f"weight decay {weight_decay:.3g} "
            f"({config['weight_decay']:g} × {config['weight_decay_images']:,} / "
            f"{sampler.num_images:,}), "
        )
    print(
        f"global batch {sampler.global_batch} ({sampler.micro_batches} × {sampler.micro_batch}), "
        f"{lr}, {decay}{config['epochs']} epochs of {sampler.steps_per_epoch} steps, "
        f"{config['precision']}, {workers} workers per process"
    )

    # Settings that differ from the flags, and warnings.
    if "train_sizes" in config:
        sizes = ", ".join(str(size) for size in list_train_sizes(config))
        every = count_validation_interval(config, sampler.num_images, num_val_images)
        every = min(every, config["epochs"])
        print(
            f"training at {sizes} px, validation at {config['img_size']} px"
            + (f", validation every {every} epochs" if every > 1 else "")
        )
    if base * weight_decay > 0.1:
        print(
            f"warning: a step decays the weights by {100 * base * weight_decay:.0f} %: use a "
            "smaller --weight_decay or --lr"
        )
    if sampler.micro_batch < config["batch_size"]:
        print(
            f"the training set is smaller than a batch of {config['batch_size']} per process: "
            f"each epoch is one step of {sampler.global_batch} images"
        )
    if warmup_steps < round(config["warmup_epochs"] * sampler.steps_per_epoch):
        print(
            f"--warmup_epochs {config['warmup_epochs']:g} is not shorter than the run: the "
            f"warm-up is a tenth of it, {warmup_steps} of {total_steps} steps"
        )


def warn_of_small_images(data_dir: Path, config: dict) -> None:
    """Say so where the images of a pack are smaller than validation resizes them to."""
    resize = make_eval_transform(config).resize
    packed = read_manifest(data_dir).get("short_side") if (data_dir / MANIFEST).is_file() else None
    if packed is not None and packed < resize:
        print(
            f"warning: {data_dir} was packed with --short_side {packed}, and validation needs "
            f"{resize} px: its images are enlarged"
        )


def make_weights_dir(folder: Path) -> None:
    """Create the folder at the start: a wrong path should fail now, not after twelve days."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try_writing_beside(folder / "weights")
    except OSError as error:
        raise UserError(f"--weights_dir {folder}: {error.strerror}") from error


def export(
    args: argparse.Namespace, state: TrainState, model: torch.nn.Module, num_val_images: int
) -> None:
    """Write the last epoch's weights into both folders."""
    last = state.history[-1]
    record = {
        "model": args.model,
        "classes": len(state.classes),
        "class_names": state.classes,
        "epochs": state.epoch,
        "top1": last["val_top1"],
        "top5": last["val_top5"],
        "val_images": num_val_images,
        "img_size": args.img_size,
        "recipe": state.config,
        "seed": args.seed,
        "checkpoint_dir": str(args.checkpoint_dir.resolve()),
    }
    write_weights(model, record, weights_stem(args.model), [args.checkpoint_dir, args.weights_dir])


if __name__ == "__main__":
    run(main, ends_torchrun=True)
