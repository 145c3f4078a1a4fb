"""Measure the data path and the training step against the plain recipe, side by side in one run.

  python -m tools.benchmark loader --data_dir /path/to/imagenet   CPU time an image of the workers
  python -m tools.benchmark step                                  one training step, and its memory
  python -m tools.benchmark joint --cores 32 --gpus 4 --step_rate 3000   which of the two decides
  python -m tools.benchmark pretrain --data_dir /path/to/imagenet --epochs 3   all of it, end to end
  python -m tools.benchmark sweep --data_dir data/dtd             two networks on two folds
  python -m tools.benchmark start --data_dir data/dtd             train.py, up to its first step

Rows take turns, so that whatever else the machine does falls on all of them, and medians are shown.
CPU time is this process's; start it with OMP_NUM_THREADS=1 for figures a core. Without --data_dir
images are drawn. --step_rate is images/s of one GPU with all the data it wants.

pretrain and sweep start the real scripts, once as they are and once with --no_amp and the data path
of tools/benchmark/plain.py, pretrain also in NCHW. Times are of all that is started, divided by the
images trained on.
"""

import json
import os
from pathlib import Path

import torch

from common.cli import Parser, at_least, run
from common.errors import UserError
from common.processes import usable_cpus
from tools.benchmark.end_to_end import pretrain, start, sweep
from tools.benchmark.loader import loader
from tools.benchmark.step import make_step, step
from tools.benchmark.timing import interleaved, print_table

EPOCHS = {"joint": 600, "pretrain": 3, "sweep": 10}
IMAGENET_TRAIN = 1_281_167


def parse_args(argv: list[str] | None = None):
    parser = Parser(prog="python -m tools.benchmark", description=__doc__)
    parser.add_argument("what", choices=SUBCOMMANDS, help=f"one of {', '.join(SUBCOMMANDS)}")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--rounds",
        type=at_least(1),
        metavar="N",
        help="turns of each row; the medians are shown (default: 5, and 1 of pretrain and sweep)",
    )
    parser.add_argument("--img_size", type=at_least(32), default=224, metavar="PX", help="crop")
    parser.add_argument(
        "--batch_size", type=at_least(2), default=32, metavar="B", help="images a batch"
    )
    parser.add_argument(
        "--data_dir",
        type=Path,
        metavar="DIR",
        help="a tree with train/, for loader and joint also a folder of class "
        "folders; DTD for sweep and start",
    )
    parser.add_argument(
        "--epochs",
        type=at_least(1),
        metavar="N",
        help="of pretrain (default: 3) and sweep (10); for joint, of ImageNet's "
        "1,281,167 images (600)",
    )
    loader = parser.add_argument_group("loader and joint")
    loader.add_argument(
        "--images",
        type=at_least(2),
        default=128,
        metavar="N",
        help="how many of its images are read",
    )
    joint = parser.add_argument_group("joint")
    joint.add_argument(
        "--cores", type=at_least(1), default=usable_cpus(), metavar="C", help="cores that load"
    )
    joint.add_argument(
        "--gpus",
        type=at_least(1),
        default=max(1, torch.cuda.device_count()),
        metavar="G",
        help="GPUs that train",
    )
    joint.add_argument(
        "--step_rate",
        type=at_least(0.001, float),
        metavar="R",
        help="images/s of a GPU's steps (default: TwistNet-18's here, measured)",
    )
    args = parser.parse_args(argv)
    whole_runs = args.what in ("pretrain", "sweep")
    args.rounds = args.rounds or (1 if whole_runs else 5)
    args.epochs = args.epochs or EPOCHS.get(args.what, 1)
    if args.what in ("pretrain", "sweep", "start") and not args.data_dir:
        raise UserError(f"{args.what} needs real images: say where they are with --data_dir")
    return args


def joint(args) -> dict:
    found = loader(args)
    rate = args.step_rate
    if rate is None:
        turn = make_step(
            "twistnet18", plain=False, batch_size=args.batch_size, img_size=args.img_size
        )
        rate = (
            1e3 / interleaved({"": turn}, rounds=args.rounds, images=args.batch_size)[0]["wall_ms"]
        )
    machine = []
    for row in found["loader"]:
        loads, trains = args.cores * 1e3 / row["cpu_ms"], args.gpus * rate
        reached = min(loads, trains)
        machine.append(
            {
                "row": row["row"],
                "loads": loads,
                "trains": trains,
                "reached": reached,
                "bottleneck": "loader" if loads < trains else "step",
                "days": args.epochs * IMAGENET_TRAIN / reached / 86400,
            }
        )
    return {
        **found,
        "joint": machine,
        "cores": args.cores,
        "gpus": args.gpus,
        "step_rate": rate,
        "epochs": args.epochs,
    }


SUBCOMMANDS = {
    "loader": loader,
    "step": step,
    "joint": joint,
    "pretrain": pretrain,
    "sweep": sweep,
    "start": start,
}


def show(found: dict) -> None:
    if "loader" in found:
        sizes = ", ".join(f"{what} {size:.0f} KB" for what, size in found["kb"].items())
        print_table(
            f"loader, an image, of {found['images']} images ({sizes} each)", found["loader"]
        )
        print_table("what the device does to it, in batches", found["device"])
    if "step" in found:
        print_table(
            f"step, an image, batch {found['batch_size']}, {found['img_size']} px, "
            f"{found['threads']} threads",
            found["step"],
        )
        for row in found["step"]:
            print(f"peak memory, {row['row']}: {row['peak_mb']:,.0f} MB")
        print(
            f"twistnet18 / resnet18: time {found['twistnet_time']:.3f}, memory "
            f"{found['twistnet_memory']:.3f}"
        )
    if "start" in found:
        print_table("from the command to the first step", found["start"])
    for what in {"pretrain", "sweep"} & found.keys():
        print_table(
            f"{what}, an image trained on, of {found['images']} at {found['img_size']} px",
            found[what],
        )
        for row in found[what]:
            print(f"accuracy, {row['row']}: {row['accuracy']:.1f} %")
    if "joint" in found:
        print(
            f"\n{found['cores']} cores, {found['gpus']} GPUs at {found['step_rate']:.0f} images/s"
            f", {found['epochs']} epochs of ImageNet"
        )
        for row in found["joint"]:
            print(
                f"{row['row']:32} loads {row['loads']:8.0f}, trains {row['trains']:8.0f} "
                f"images/s: the {row['bottleneck']} decides, {row['reached']:.0f} images/s, "
                f"{row['days']:.1f} days"
            )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("the benchmark is one process: start it with python, not torchrun")
    found = SUBCOMMANDS[args.what](args)
    print(json.dumps(found, indent=1)) if args.json else show(found)


if __name__ == "__main__":
    run(main)
