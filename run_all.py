"""Run a sweep, models × folds × seeds, and compare the models in a table.

  python run_all.py --data_dir data/dtd --dataset dtd --models resnet18,twistnet18 \\
      --folds 1-10 --seeds 42,43,44 --epochs 100 --run_dir runs/main

Every flag that is not listed here goes to train.py (see train.py --help). Finished runs are
skipped, interrupted ones go on: the same command again continues a sweep that was stopped.
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import train
from data import DataError
from data.images import quick_look
from models import MODELS, ModelError, build_model
from sweeps.launching import DONE, FAILED, Cell, LocalPool, tail
from sweeps.results import SweepError
from sweeps.tables import write_tables
from training import RunError
from training.command_line import Parser, at_least, run
from training.distributed import usable_cpus
from training.loop import Preempted
from training.preemption import StopRequest
from training.record import read_json, write_json

OWN = {"fold": "--folds", "seed": "--seeds", "model": "--models", "overwrite": "--force"}


def make_parser() -> Parser:
    parser = Parser(description=__doc__)
    sweep = parser.add_argument_group("sweep")
    sweep.add_argument("--models", type=names, default=["resnet18", "twistnet18"], metavar="A,B",
                       help=f"of {', '.join(MODELS)} (default: resnet18,twistnet18)")
    sweep.add_argument("--folds", type=numbers, default=[1], metavar="1-10",
                       help="numbers and ranges (default: 1)")
    sweep.add_argument("--seeds", type=numbers, default=[42], metavar="42,43",
                       help="numbers and ranges (default: 42)")
    sweep.add_argument("--run_dir", type=Path, default=Path("runs"), metavar="DIR",
                       help="where the run folders and the table go")
    sweep.add_argument("--force", action="store_true",
                       help="run every cell anew; what lies there moves to RUN_DIR/overwritten")
    sweep.add_argument("--dry_run", action="store_true",
                       help="print the commands of the cells that are not finished, and end")
    where = parser.add_argument_group("where it runs")
    where.add_argument("--slots", type=at_least(1), default=1, metavar="N",
                       help="runs at a time, which share the cores")
    where.add_argument("--gpus", type=numbers, metavar="0,1",
                       help="one run at a time on each of these GPUs, instead of --slots")
    return parser


def names(text: str) -> list[str]:
    found = [name for name in text.split(",") if name]
    unknown = [name for name in found if name not in MODELS]
    if unknown or not found or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of different models out of {', '.join(MODELS)}")
    return found


def numbers(text: str) -> list[int]:
    """"1-3,7" → [1, 2, 3, 7]."""
    found = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            found += range(int(first), int(last or first) + 1)
    except ValueError:
        found = []
    if not found or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of different numbers and ranges such as 1-3,7")
    return found


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """This script's flags, and those for train.py, which are checked here too."""
    parser, single = make_parser(), train.make_parser()
    args, forwarded = parser.parse_known_args(argv)
    for name in single.given(forwarded):
        if name in OWN:
            raise RunError(f"--{name} is for train.py: a sweep has {OWN[name]}")
    return args, forwarded


def single_args(args, forwarded: list[str], model: str, fold: int, seed: int):
    """train.py's command line for one cell, and what train.py makes of it."""
    line = [*forwarded, "--model", model, "--fold", str(fold), "--seed", str(seed),
            "--run_dir", str(args.run_dir)]
    return line, train.make_parser().parse_args(line)


def plan(args, forwarded: list[str]) -> tuple[list[Cell], set[str], dict[Path, dict]]:
    """The cells to run, the folders with runs of other settings, and each cell's configuration.

    Checks models, weights, folds and data of all cells first: RunError, DataError or ModelError.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _, first = single_args(args, forwarded, args.models[0], args.folds[0], args.seeds[0])
    splits = {}
    for fold in args.folds:
        _, single = single_args(args, forwarded, args.models[0], fold, args.seeds[0])
        splits[fold] = train.load_data(single)
    quick_look(splits[args.folds[0]].val)
    for model in args.models:
        build_model(model, len(splits[args.folds[0]].classes), first.pretrained)
    cells, other, configs = [], set(), {}
    script = str(Path(train.__file__).resolve())
    for fold in args.folds:
        for seed in args.seeds:
            for model in args.models:
                line, single = single_args(args, forwarded, model, fold, seed)
                folder = train.run_folder(single)
                configs[folder] = train.make_config(single, splits[fold], device)
                cell = Cell(folder, [sys.executable, "-u", script, *line])
                if args.force:
                    cell.command.append("--overwrite")
                    cells.append(cell)
                    continue
                try:
                    if not train.finished(folder, configs[folder]):
                        cells.append(cell)
                except RunError as error:
                    print(f"not reused: {error}".replace("--overwrite moves it", "--force moves it"))
                    other.add(folder.name)
    return cells, other, configs


def slot_environments(args) -> list[dict[str, str]]:
    """One environment a slot: its GPU, its share of the cores."""
    count = len(args.gpus) if args.gpus else args.slots
    threads = {"OMP_NUM_THREADS": str(max(1, usable_cpus() // count))} if count > 1 else {}
    if args.gpus:
        return [{**threads, "CUDA_VISIBLE_DEVICES": str(gpu)} for gpu in args.gpus]
    return [threads] * count


def main() -> None:
    args, forwarded = parse_args()
    cells, other, configs = plan(args, forwarded)
    if args.dry_run:
        for cell in cells:
            print(shlex.join(["python", *cell.command[2:]]))
        return
    total = len(configs)
    dataset = next(iter(configs.values()))["dataset"]
    grid = {"dataset": dataset, "models": args.models, "folds": args.folds, "seeds": args.seeds}
    args.run_dir.mkdir(parents=True, exist_ok=True)
    write_json(args.run_dir / "sweep.json", grid)
    print(f"{total} runs: {total - len(cells) - len(other)} finished, {len(cells)} to do, "
          f"{len(other)} of other settings", flush=True)

    failed, accuracies = sorted(other), {}
    bar = tqdm(total=total, initial=total - len(cells) - len(other), unit="run", disable=None)

    def finished(cell: Cell, outcome: str) -> None:
        if outcome == DONE:
            results = read_json(cell.folder / train.RESULTS)
            accuracies.setdefault(results["model"], []).append(results["test_acc"])
            bar.update()
            bar.write(f"{cell.name}: val_acc {results['val_acc']:.1f}, test_acc "
                      f"{results['test_acc']:.1f}, {results['seconds']:.0f} s")
        elif outcome == FAILED:
            failed.append(cell.name)
            bar.write(f"{cell.name} failed; its output ends with\n{tail(cell.folder)}")
        means = [f"{m} {sum(a) / len(a):.1f}" for m, a in accuracies.items()]
        bar.set_postfix_str(", ".join([f"failed {len(failed)}", *means]))

    stop = StopRequest()
    LocalPool(slot_environments(args), stop=lambda: bool(stop), finished=finished,
              is_done=lambda cell: train.finished(cell.folder, configs[cell.folder]) is not None,
              ).run(cells)
    bar.close()
    print(write_tables(args.run_dir, **grid, skip=other), flush=True)
    if stop:
        raise Preempted(f"stopped by {stop.reason}: the same command goes on")
    if failed:
        print(f"failed or not reused: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run(main, DataError, ModelError, SweepError)
