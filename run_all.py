"""Run a sweep, models × folds × seeds, and compare the models in a table.

  python run_all.py --data_dir data/dtd --dataset dtd --models resnet18,twistnet18 \\
      --folds 1-10 --seeds 42,43,44 --epochs 100 --run_dir runs/main

Every flag that is not listed here goes to train.py (see train.py --help). Finished runs are
skipped, interrupted ones go on: the same command again continues a sweep that was stopped, and
may run several times at once.
"""

import argparse
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

import train
from common.cli import Parser, at_least, run
from common.errors import Preempted, UserError
from common.files import write_json
from common.processes import usable_cpus
from data.images import spot_check
from models import MODELS, build_model
from models.weights import load_pretrained
from sweeps.launching import AGAIN, BUSY, DONE, FAILED, Cell, Line, LocalPool, make_slots, tail
from sweeps.slurm import submit
from sweeps.tables import write_tables
from training.preemption import StopRequest
from training.run_config import CONFIG, load_config, load_finished
from training.run_dir import RunDir

OWN = {"fold": "--folds", "seed": "--seeds", "model": "--models"}
ROOT = Path(__file__).resolve().parent


def make_parser() -> Parser:
    parser = Parser(prog="run_all.py", description=__doc__)
    sweep = parser.add_argument_group("sweep")
    sweep.add_argument(
        "--models",
        type=names,
        default="resnet18,twistnet18",
        metavar="A,B",
        help=f"of {', '.join(MODELS)}",
    )
    sweep.add_argument(
        "--folds", type=numbers, default="1", metavar="1-10", help="numbers and ranges"
    )
    sweep.add_argument(
        "--seeds", type=numbers, default="42", metavar="42,43", help="numbers and ranges"
    )
    sweep.add_argument(
        "--run_dir",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="where the run folders and the table go",
    )
    sweep.add_argument(
        "--overwrite",
        action="store_true",
        help="run every cell anew; what lies there moves to RUN_DIR/overwritten",
    )
    sweep.add_argument(
        "--dry_run",
        action="store_true",
        help="print the commands of the cells that are not finished, and end",
    )
    sweep.add_argument(
        "--launcher",
        choices=["local", "slurm"],
        default="local",
        help="this machine, or a Slurm job array (pip install submitit)",
    )
    local = parser.add_argument_group("--launcher local")
    local.add_argument(
        "--slots",
        type=at_least(1),
        metavar="N",
        help="runs at a time, which share the cores (default: 1)",
    )
    local.add_argument(
        "--gpus",
        type=numbers,
        metavar="0,1",
        help="one run at a time on each of these GPUs, instead of --slots",
    )
    slurm = parser.add_argument_group(
        "--launcher slurm", "what else sbatch takes: in its variables, such as SBATCH_ACCOUNT"
    )
    slurm.add_argument("--partition", metavar="NAME", help="of the cluster (default: its own)")
    slurm.add_argument(
        "--time",
        type=at_least(10),
        metavar="MINUTES",
        help="time limit, after which a run is queued again (default: 240)",
    )
    slurm.add_argument("--gpus_per_task", type=at_least(0), metavar="N", help="(default: 1)")
    slurm.add_argument(
        "--at_once",
        type=at_least(1),
        metavar="N",
        help="runs at a time (default: what the cluster gives)",
    )
    return parser


def names(text: str) -> list[str]:
    found = [name for name in text.split(",") if name]
    unknown = [name for name in found if name not in MODELS]
    if unknown or not found or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of different models out of {', '.join(MODELS)}"
        )
    return found


def numbers(text: str) -> list[int]:
    """ "1-3,7" → [1, 2, 3, 7]."""
    found = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            found += range(int(first), int(last or first) + 1)
    except ValueError:
        found = []
    if not found or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of different numbers and ranges such as 1-3,7"
        )
    return found


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """This script's flags, and those for train.py, which are checked here too."""
    args, forwarded = make_parser().parse_known_args(argv)
    for name in train.make_parser().given(forwarded):
        if name in OWN:
            raise UserError(f"--{name} is for train.py: a sweep has {OWN[name]}")
    defaults = {
        "local": {"slots": None, "gpus": None},
        "slurm": {"partition": None, "time": 240, "gpus_per_task": 1, "at_once": None},
    }
    for launcher, flags in defaults.items():
        for name, default in flags.items():
            if getattr(args, name) is None:
                setattr(args, name, default)
            elif launcher != args.launcher:
                raise UserError(f"--{name} goes with --launcher {launcher}")
    if args.gpus and args.slots:
        raise UserError("--gpus and --slots: give one of them, there is one run at a time on a GPU")
    return args, forwarded


@dataclass
class Plan:
    """What there is to do."""

    dataset: str
    configs: dict[Path, dict] = field(default_factory=dict)  # of all cells, by folder
    cells: list[Cell] = field(default_factory=list)  # to run
    finished: list[dict] = field(default_factory=list)  # results of those that are done
    other: list[str] = field(default_factory=list)  # names of those with runs of other settings
    workers: int = 0  # loader processes a run, as asked for


def make_plan(args, forwarded: list[str]) -> Plan:
    """Look at every cell, after checking models, weights, folds and data of them all.

    Raises UserError, UserError or UserError.
    """
    there = torch.cuda.device_count()
    if args.gpus and max(args.gpus) >= there:
        raise UserError(f"--gpus {max(args.gpus)}: torch sees {there} GPUs here, counted from 0")

    def single(model: str, fold: int, seed: int):
        line = [
            *forwarded,
            "--model",
            model,
            "--fold",
            str(fold),
            "--seed",
            str(seed),
            "--run_dir",
            str(args.run_dir),
        ]
        return line, train.make_parser().parse_args(line)

    _, first = single(args.models[0], args.folds[0], args.seeds[0])
    splits = {
        fold: train.load_data(single(args.models[0], fold, args.seeds[0])[1]) for fold in args.folds
    }
    spot_check(splits[args.folds[0]].val)
    for model in args.models:
        network = build_model(model, len(splits[args.folds[0]].classes))
        load_pretrained(network, model, first.pretrained)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = Plan(first.dataset, workers=first.workers)
    for fold in args.folds:
        for seed in args.seeds:
            for model in args.models:
                line, cell_args = single(model, fold, seed)
                folder = train.run_folder(cell_args)
                cell_args.overwrite = args.overwrite
                config = train.make_config(cell_args, splits[fold], device)
                if args.launcher == "slurm":  # the node's device decides, and train.py checks it
                    old = load_config(folder) or {}
                    config["precision"] = old.get("precision") or config["precision"]
                plan.configs[folder] = config
                script = str(Path(train.__file__).resolve())
                look_at(plan, Cell(folder, [sys.executable, "-u", script, *line]), args.overwrite)
    return plan


def look_at(plan: Plan, cell: Cell, overwrite: bool) -> None:
    """Put a cell where it belongs."""
    try:
        results = None if overwrite else load_finished(cell.folder, plan.configs[cell.folder])
    except UserError as error:
        print(f"not reused: {error}", file=sys.stderr, flush=True)
        plan.other.append(cell.name)
        return
    if results:
        plan.finished.append(results)
    else:
        plan.cells.append(cell)


def set_aside(run_dir: Path, cells: list[Cell]) -> None:
    """Move old runs to RUN_DIR/overwritten: all of them, or none where one is running."""
    held = [RunDir(cell.folder) for cell in cells if cell.folder.exists()]
    for folder in held:
        folder.lock()  # until this function ends
    for folder in held:
        if folder.contains_run():
            folder.archive(run_dir / "overwritten" / folder.path.name)


def run_here(args, plan: Plan, stop: StopRequest) -> tuple[list[str], list[str]]:
    """Run the cells on this machine; the names of those that failed, and of those still to do."""
    failed, problems, left = [], {}, {cell.name for cell in plan.cells}
    line = Line(len(plan.finished) + len(plan.cells), plan.finished, len(plan.other))

    def results_of(cell: Cell) -> dict | None:
        try:
            return load_finished(cell.folder, plan.configs[cell.folder])
        except UserError as error:
            problems[cell.folder] = f": {error}"

    def report(cell: Cell, outcome: str) -> None:
        if outcome in (DONE, FAILED):
            left.discard(cell.name)
        if outcome == DONE:
            line.add(cell.name, results_of(cell))
        elif outcome == BUSY:
            line.say(f"{cell.name} is being run by another process, and waited for")
        elif outcome in (FAILED, AGAIN):
            what = "failed twice" if cell.failures and outcome == FAILED else "failed"
            line.say(
                f"{cell.name} {what}{problems.get(cell.folder, '')}; its output ends with\n"
                f"{tail(cell.folder)}" + ("\nonce more" if outcome == AGAIN else "")
            )
        if outcome == FAILED:
            failed.append(cell.name)
            line.failed += 1

    slots = make_slots(plan.cells, args.slots, args.gpus, cores=usable_cpus(), workers=plan.workers)
    LocalPool(
        slots,
        stop=lambda: stop.requested,
        report=report,
        polled=line.show,
        is_done=lambda cell: results_of(cell) is not None,
    ).run(plan.cells)
    line.close()
    return failed, sorted(left)


def main(argv: list[str] | None = None) -> None:
    args, forwarded = parse_args(argv)
    plan = make_plan(args, forwarded)
    if args.dry_run:
        for cell in plan.cells:
            print(shlex.join(cell.command + ["--overwrite"] * args.overwrite))
        return
    grid = {
        "dataset": plan.dataset,
        "models": args.models,
        "folds": args.folds,
        "seeds": args.seeds,
    }
    try:
        args.run_dir.mkdir(parents=True, exist_ok=True)
        write_json(args.run_dir / "sweep.json", grid)
        if args.overwrite:
            set_aside(args.run_dir, plan.cells)
    except OSError as error:
        raise UserError(f"--run_dir {args.run_dir} cannot be written ({error.strerror})") from error
    started = sum((cell.folder / CONFIG).exists() for cell in plan.cells)
    print(
        f"{len(plan.configs)} runs: {len(plan.finished)} finished, {len(plan.cells)} to do "
        f"({started} of them begun), {len(plan.other)} of other settings",
        flush=True,
    )

    if args.launcher == "slurm" and plan.cells:
        return submit_all(args, plan)
    stop = StopRequest()
    failed, left = run_here(args, plan, stop)
    print(write_tables(args.run_dir, **grid, skip=plan.other), flush=True)
    if left:
        again = "the same command without --overwrite" if args.overwrite else "the same command"
        raise Preempted(
            f"stopped by {stop.reason or 'a signal to a run'} with {len(left)} runs to "
            f"do: {again} goes on"
        )
    if plan.other + failed:
        print(f"failed or not reused: {', '.join(plan.other + failed)}", file=sys.stderr)
        sys.exit(1)


def submit_all(args, plan: Plan) -> None:
    """Queue the cells, and say how to collect them."""
    logs = args.run_dir / "slurm"
    job = submit(
        plan.cells,
        logs,
        minutes=args.time,
        partition=args.partition,
        gpus=args.gpus_per_task,
        cpus=plan.workers + 1,
        at_once=args.at_once,
    )
    there = "" if Path.cwd() == ROOT else f"cd {shlex.quote(str(ROOT))} && "
    folder = args.run_dir if Path.cwd() == ROOT else args.run_dir.resolve()
    print(
        f"Slurm job array {job}: {len(plan.cells)} runs. Each one's output goes to output.log in "
        f"its folder, Slurm's own to {logs}.\nThe same command again queues what is missing "
        "then. The table, now or when all are done:\n  "
        f"{there}python -m tools.report {shlex.quote(str(folder))}"
    )
    if plan.other:
        print(f"not reused: {', '.join(plan.other)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run(main)
