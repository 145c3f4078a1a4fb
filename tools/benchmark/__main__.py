"""Measure data loading and training against the plain recipe, side by side in one run.

  python -m tools.benchmark loader --data_dir /path/to/imagenet   CPU time per image of the workers
  python -m tools.benchmark step                                  one training step, and its memory
  python -m tools.benchmark joint --cores 32 --gpus 4 --step_rate 3000   which of the two limits
  python -m tools.benchmark joint --recipe fast --cores 32 --gpus 4      days of another recipe
  python -m tools.benchmark pretrain --data_dir /path/to/imagenet --epochs 3   whole pretrainings
  python -m tools.benchmark sweep --data_dir data/dtd             two networks on two folds
  python -m tools.benchmark start                                 the fixed cost of a run

The plain recipe is tools/benchmark/plain_train.py, what most repositories copy: ImageFolder, Pillow
transforms, float32, torch.optim. Rows take turns, so that other load on the machine affects all of
them alike; medians are printed. CPU time is that of this process, or in pretrain, sweep and start
of the processes started; set OMP_NUM_THREADS=1 for figures per core. loader and joint draw
their own images if no --data_dir is given; those of step are random.

--recipe is that of loader and joint; pretrain measures it beside the guide's. joint measures each
image size of a recipe whose images grow, and adds up the epochs; --step_rate is then for
--img_size, and for other sizes it is scaled inversely with the number of pixels.

step compares the plain recipe's ResNet-18 with ours, and ours with TwistNet-18 in each of its
implementations: plain, fused, and compiled by torch.compile. --step_rate is images/s of one GPU
that never waits for data, as step prints it.
"""

import json
from collections import Counter
from pathlib import Path

import torch

from common.cli import Parser, at_least, run
from common.errors import UserError
from common.processes import read_integer, usable_cpus
from data.transforms import make_size_schedule
from tools.benchmark.end_to_end import measure_pretrain, measure_start, measure_sweep
from tools.benchmark.loader import measure_loader, measure_loader_at
from tools.benchmark.step import make_turn, measure_step, steps_per_turn
from tools.benchmark.timing import interleaved, print_table
from training.recipes import PRETRAIN

EPOCHS = {"pretrain": 3, "sweep": 10}
IMAGENET_TRAIN = 1_281_167
WHOLE_RUNS = ("pretrain", "sweep")
TAKE_A_RECIPE = ("loader", "joint", "pretrain")


def parse_args(argv: list[str] | None = None):
    parser = Parser(prog="python -m tools.benchmark", description=__doc__)
    parser.add_argument("what", choices=SUBCOMMANDS, help=f"one of {', '.join(SUBCOMMANDS)}")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--rounds",
        type=at_least(1),
        metavar="N",
        help="turns per row, of which the median is printed (default: 5; pretrain and sweep: 1)",
    )
    parser.add_argument(
        "--img_size", type=at_least(32), default=224, metavar="PX", help="size of the crop"
    )
    parser.add_argument(
        "--recipe",
        default="guide",
        choices=PRETRAIN,
        metavar="NAME",
        help=f"for loader, joint and pretrain, one of {', '.join(PRETRAIN)}",
    )
    parser.add_argument(
        "--batch_size",
        type=at_least(2),
        metavar="B",
        help="images per batch (default: 32; step and joint on a GPU: 256)",
    )
    parser.add_argument(
        "--data_dir",
        type=Path,
        metavar="DIR",
        help="ImageNet-like tree with train/ and val/; for loader and joint also a folder of class "
        "folders; for sweep the DTD",
    )
    parser.add_argument(
        "--epochs",
        type=at_least(1),
        metavar="N",
        help="epochs of pretrain (default: 3) and sweep (10); for joint, of ImageNet's "
        "1,281,167 images (as in the recipe)",
    )
    loader = parser.add_argument_group("loader and joint")
    loader.add_argument(
        "--images", type=at_least(2), default=128, metavar="N", help="number of images to load"
    )
    joint = parser.add_argument_group("joint")
    joint.add_argument(
        "--cores",
        type=at_least(1),
        default=usable_cpus(),
        metavar="C",
        help="number of cores that load",
    )
    joint.add_argument(
        "--gpus",
        type=at_least(1),
        default=max(1, torch.cuda.device_count()),
        metavar="G",
        help="number of GPUs that train",
    )
    joint.add_argument(
        "--step_rate",
        type=at_least(0.001, float),
        metavar="R",
        help="training images/s of one GPU (default: TwistNet-18's on this machine, measured)",
    )
    args = parser.parse_args(argv)

    # defaults that depend on what is measured, and where
    on_gpu = torch.cuda.is_available() and args.what in ("step", "joint")
    args.batch_size = args.batch_size or (256 if on_gpu else 32)
    args.rounds = args.rounds or (1 if args.what in WHOLE_RUNS else 5)
    args.epochs = args.epochs or EPOCHS.get(args.what) or PRETRAIN[args.recipe]["epochs"]
    if args.recipe != "guide" and args.what not in TAKE_A_RECIPE:
        raise UserError(f"--recipe is for {', '.join(TAKE_A_RECIPE)}: {args.what} does not take it")
    if args.what in WHOLE_RUNS and not args.data_dir:
        raise UserError(f"{args.what} needs real images: give their folder with --data_dir")
    return args


def measure_joint(args) -> dict:
    """What limits a machine, its loader or its training step, and how long ImageNet takes."""
    # The loader and the step, at each image size of the run.
    epochs_of = count_epochs_by_size(args.recipe, args.img_size, args.epochs)
    found = measure_loader_at(args, list(epochs_of))
    rates = {size: measure_rate(args, size) for size in epochs_of}

    # Every epoch takes as long as the slower of the two.
    machine = []
    for rows in zip(*(found[size]["loader"] for size in epochs_of), strict=True):
        seconds, parts = 0.0, []
        for (size, epochs), row in zip(epochs_of.items(), rows, strict=True):
            loads, trains = args.cores * 1e3 / row["cpu_ms"], args.gpus * rates[size]
            reached = min(loads, trains)
            seconds += epochs * IMAGENET_TRAIN / reached
            parts.append(
                {
                    "size": size,
                    "epochs": epochs,
                    "loads": loads,
                    "trains": trains,
                    "reached": reached,
                    "bottleneck": "loader" if loads < trains else "step",
                }
            )
        machine.append({"row": rows[0]["row"], "parts": parts, "days": seconds / 86400})
    settings = {"cores": args.cores, "gpus": args.gpus, "epochs": args.epochs}
    return {**found[max(found)], "joint": machine, "step_rates": rates, **settings}


def count_epochs_by_size(recipe: str, img_size: int, epochs: int) -> dict[int, int]:
    """Side of the training crop in pixels → how many epochs of the run have it."""
    size_at = make_size_schedule({**PRETRAIN[recipe], "img_size": img_size, "epochs": epochs})
    return Counter(map(size_at, range(epochs)))


def measure_rate(args, size: int) -> float:
    """Images/s that one GPU trains, of `size` × `size` pixels."""
    if args.step_rate is not None:
        return args.step_rate * (args.img_size / size) ** 2
    turn = make_turn(
        "twistnet18", "auto", batch_size=args.batch_size, img_size=size, recipe=args.recipe
    )
    images = args.batch_size * steps_per_turn()
    (row,) = interleaved({"": turn}, rounds=args.rounds, images=images)
    return 1e3 / row["wall_ms"]


SUBCOMMANDS = {
    "loader": measure_loader,
    "step": measure_step,
    "joint": measure_joint,
    "pretrain": measure_pretrain,
    "sweep": measure_sweep,
    "start": measure_start,
}


def print_loader(found: dict) -> None:
    sizes = ", ".join(f"{what} {size:.0f} KB" for what, size in found["kb"].items())
    print_table(
        f"loader, per image at {found['size']} px, {found['images']} images ({sizes} each)",
        found["loader"],
    )
    print_table("the device's part of augmentation, in batches, per image", found["device"])


def print_step(found: dict) -> None:
    print_table(
        f"step, per image, batch {found['batch_size']}, {found['img_size']} px, "
        f"{found['threads']} threads",
        found["step"],
    )
    for row in found["step"]:
        if "peak_mb" in row:
            print(f"peak memory, {row['row']}: {row['peak_mb']:,.0f} MB")
    for row in found["step"]:
        if "time_vs_resnet" in row:
            memory = f", memory {row['memory_vs_resnet']:.3f}" if "memory_vs_resnet" in row else ""
            print(f"{row['row']} / ours, ResNet-18: time {row['time_vs_resnet']:.3f}{memory}")
    for row, reason in found["left_out"].items():
        print(f"left out, {row}: {reason}")


def print_whole_runs(what: str, found: dict) -> None:
    print_table(
        f"{what}, per training image, {found['images']} of them at {found['img_size']} px",
        found[what],
    )
    for row in found[what]:
        print(f"validation accuracy, {row['row']}: {row['accuracy']:.1f} %")


def print_joint(found: dict) -> None:
    rates = " / ".join(f"{rate:.0f}" for rate in found["step_rates"].values())
    sizes = " / ".join(f"{size}" for size in found["step_rates"])
    print(
        f"\n{found['cores']} cores, {found['gpus']} GPUs at {rates} images/s ({sizes} px), "
        f"{found['epochs']} epochs of ImageNet"
    )
    for row in found["joint"]:
        for part in row["parts"]:
            print(
                f"{row['row']:32} {part['size']} px, {part['epochs']} epochs: loads "
                f"{part['loads']:8.0f}, trains {part['trains']:8.0f} images/s: limited by the "
                f"{part['bottleneck']}, {part['reached']:.0f} images/s"
            )
        print(f"{row['row']:32} {row['days']:.2f} days without validation")


def show(found: dict) -> None:
    """Print what a subcommand has found; joint has the loader's tables too."""
    if "loader" in found:
        print_loader(found)
    if "step" in found:
        print_step(found)
    if "start" in found:
        print_table("a run of one epoch on a few small images, start to exit", found["start"])
    for what in WHOLE_RUNS:
        if what in found:
            print_whole_runs(what, found)
    if "joint" in found:
        print_joint(found)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if read_integer("WORLD_SIZE", 1) > 1:
        raise UserError("the benchmark is one process: start it with python, not torchrun")
    found = SUBCOMMANDS[args.what](args)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        show(found)


if __name__ == "__main__":
    run(main)
