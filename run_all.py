"""Run a sweep (models × folds × seeds) and compare the models in a table.

  python run_all.py --data_dir data/dtd --dataset dtd --models resnet18,twistnet18 \\
      --folds 1-10 --seeds 42,43,44 --epochs 100 --run_dir runs/main

Flags that are not listed here are passed on to train.py (see train.py --help). Finished runs are
skipped and interrupted ones resume, so the same command again continues a sweep that was stopped.
Several run_all.py may work on one RUN_DIR at the same time; they share the runs.
"""

import argparse
import contextlib
import itertools
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

import train
from common.cli import Parser, at_least, run
from common.errors import Preempted, UserError
from common.files import ROOT
from common.processes import usable_cpus
from data.images import spot_check
from models import CHOICES, MODELS, build_model, is_timm, model_name
from models.weights import load_pretrained
from sweeps.launching import (
    BUSY,
    DONE,
    FAILED,
    RETRY,
    Job,
    LocalPool,
    ProgressLine,
    last_output,
    make_slots,
)
from sweeps.runs import add_plan
from sweeps.slurm import submit
from sweeps.tables import write_tables
from training.preemption import StopRequest
from training.run_config import CONFIG, adopt_precision, load_finished
from training.run_dir import RunDir

# Flags of train.py that run_all.py has in another form.
SINGLE = {"--fold": "--folds", "--seed": "--seeds", "--model": "--models"}
LAUNCHER_FLAGS = {
    "local": {"jobs", "gpus"},
    "slurm": {"partition", "time", "gpus_per_task", "max_parallel"},
}


def make_parser() -> Parser:
    parser = Parser(prog="run_all.py", description=__doc__)
    sweep = parser.add_argument_group("sweep")
    sweep.add_argument(
        "--models",
        type=model_names,
        default="resnet18,twistnet18",
        metavar="A,B",
        help=f"networks to compare, out of {CHOICES}",
    )
    sweep.add_argument(
        "--folds",
        type=distinct_numbers,
        default="1",
        metavar="1-10",
        help="folds, as numbers and ranges",
    )
    sweep.add_argument(
        "--seeds",
        type=distinct_numbers,
        default="42",
        metavar="42,43",
        help="seeds, as numbers and ranges",
    )
    sweep.add_argument(
        "--run_dir",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="folder of the run folders and of the table",
    )
    sweep.add_argument(
        "--overwrite",
        action="store_true",
        help="run everything again from scratch; old runs are moved to RUN_DIR/overwritten",
    )
    sweep.add_argument(
        "--dry_run",
        action="store_true",
        help="only print the commands of the runs that are not finished, one per line",
    )
    sweep.add_argument(
        "--launcher",
        choices=["local", "slurm"],
        default="local",
        help="run on this machine, or as a Slurm job array (pip install submitit)",
    )
    local = parser.add_argument_group("--launcher local")
    local.add_argument(
        "--jobs",
        type=at_least(1),
        default=1,
        metavar="N",
        help="number of runs at the same time, which share the CPU cores",
    )
    local.add_argument(
        "--gpus",
        type=numbers,
        metavar="0,1",
        help="one run at a time on each of these GPUs, instead of --jobs; name a GPU twice (0,0) "
        "to let two runs share it",
    )
    slurm = parser.add_argument_group(
        "--launcher slurm",
        "other options of sbatch are taken from its environment variables, e.g. SBATCH_ACCOUNT",
    )
    slurm.add_argument("--partition", metavar="NAME", help="default: the cluster's")
    slurm.add_argument(
        "--time",
        type=at_least(10),
        default=240,
        metavar="MINUTES",
        help="time limit, after which a run is queued again",
    )
    slurm.add_argument(
        "--gpus_per_task", type=at_least(0), default=1, metavar="N", help="GPUs per run"
    )
    slurm.add_argument(
        "--max_parallel",
        type=at_least(1),
        default=256,
        metavar="N",
        help="largest number of runs at the same time",
    )
    return parser


def model_names(text: str) -> list[str]:
    """An argparse type: "resnet18,twistnet18" → ["resnet18", "twistnet18"]."""
    found = [name for name in text.split(",") if name]
    unknown = [name for name in found if name not in MODELS and not is_timm(name)]
    if unknown or not found or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of different models out of {CHOICES}"
        )
    return [model_name(name) for name in found]


def numbers(text: str) -> list[int]:
    """An argparse type: "1-3,7" → [1, 2, 3, 7]."""
    found = []
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            part_range = range(int(first), int(last if dash else first) + 1)
            if not part_range:
                raise ValueError(f"{part} runs backwards")
            found += part_range
    except ValueError:
        found = []
    if not found:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of numbers and ranges such as 1-3,7"
        )
    return found


def distinct_numbers(text: str) -> list[int]:
    """An argparse type: like `numbers`, each of them once."""
    found = numbers(text)
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} names a number twice")
    return found


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """This script's flags, and the words that are passed on to train.py."""
    parser = make_parser()
    args, forwarded = parser.parse_known_args(argv)
    for word in forwarded:
        flag = word.partition("=")[0]
        if flag in SINGLE:
            raise UserError(f"{flag} is a flag of train.py: a sweep has {SINGLE[flag]}")
    train.make_parser().parse_args(forwarded)

    # flags of the launcher that is not used
    for launcher, names in LAUNCHER_FLAGS.items():
        if launcher != args.launcher and parser.given & names:
            raise UserError(f"--{min(parser.given & names)} goes with --launcher {launcher}")
    if parser.given >= {"gpus", "jobs"}:
        raise UserError("give either --gpus or --jobs: --gpus 0,0 lets two runs share GPU 0")
    return args, forwarded


# ---------------------------------------------------------------- what there is to do


@dataclass
class Plan:
    """The runs of a sweep, by what has to be done."""

    dataset: str
    configs: dict[Path, dict] = field(default_factory=dict)  # of all runs, by folder
    jobs: list[Job] = field(default_factory=list)  # to run
    finished: list[dict] = field(default_factory=list)  # results of the finished ones
    not_reused: list[str] = field(default_factory=list)  # of other settings, or unusable
    workers: int = 0  # loader workers per run, as asked for
    amp: bool | None = None  # --amp or --no_amp, where given


def make_plan(args, forwarded: list[str]) -> Plan:
    """Check models, weights, folds and data of the whole sweep, then look at every run.

    Raises UserError for whatever would end a run later.
    """
    visible = torch.cuda.device_count()
    if args.gpus and max(args.gpus) >= visible:
        raise UserError(f"--gpus {max(args.gpus)}: torch sees {visible} GPUs here, counted from 0")

    # the command of every run, and its arguments
    runs = []
    for fold, seed, model in itertools.product(args.folds, args.seeds, args.models):
        own = ["--model", model, "--fold", str(fold), "--seed", str(seed)]
        words = [*forwarded, *own, "--run_dir", str(args.run_dir)]
        runs.append((words, train.make_parser().parse_args(words)))
    first = runs[0][1]

    # all data before any weights, so that a wrong --data_dir is found at once
    splits = {}
    for _, run_args in runs:
        if run_args.fold not in splits:
            splits[run_args.fold] = train.load_data(run_args)
    spot_check(splits[first.fold].val)
    check_weights(args.models, len(splits[first.fold].classes), first.pretrained, first.img_size)

    # which runs are finished, and which are to do
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    script = str(Path(train.__file__).resolve())
    plan = Plan(first.dataset, workers=first.workers, amp=first.amp)
    for words, run_args in runs:
        run_args.overwrite = args.overwrite
        folder = train.run_folder(run_args)
        plan.configs[folder] = train.make_config(run_args, splits[run_args.fold], device)
        add_to_plan(plan, Job(folder, [sys.executable, "-u", script, *words]), args)
    if args.launcher == "local" and not args.dry_run:  # else they may be trained elsewhere
        check_same_precision(plan, args)
    return plan


def check_same_precision(plan: Plan, args) -> None:
    """Raise UserError where this machine would continue a sweep in another precision."""
    old = {(results.get("settings") or {}).get("precision") for results in plan.finished} - {None}
    new = set()
    for job in plan.jobs:
        is_started = not args.overwrite and (job.folder / CONFIG).exists()
        (old if is_started else new).add(plan.configs[job.folder]["precision"])
    if not old or new <= old:
        return
    flag = {("fp32",): "add --no_amp, ", ("bf16",): "add --amp, "}.get(tuple(old), "")
    if new != {"fp32"} and old != {"fp32"}:
        flag = ""  # no flag chooses between bf16 and fp16
    raise UserError(
        f"--run_dir {args.run_dir} has runs in {', '.join(sorted(old))}, and this machine would "
        f"train others in {', '.join(sorted(new - old))}, which a table keeps apart: {flag}use a "
        "machine like the first, or choose another --run_dir"
    )


def check_weights(models: list[str], num_classes: int, pretrained: str, img_size: int) -> None:
    """Load the weights of each model once, as a check, and say what they are."""
    for model in models:
        network = build_model(model, num_classes, img_size=img_size)
        weights = load_pretrained(network, model, pretrained, img_size=img_size)
        source = "random weights" if weights["source"] == "none" else weights["source"]
        print(f"{model} starts from {source}")


def load_results(plan: Plan, folder: Path) -> dict | None:
    """The results of a run if it is finished, also of one that another machine has run since.

    Raises UserError where the run has other settings.
    """
    config = plan.configs[folder]
    precision = adopt_precision(config["precision"], folder, plan.amp)
    return load_finished(folder, {**config, "precision": precision})


def add_to_plan(plan: Plan, job: Job, args) -> None:
    """Put a run where it belongs: finished, not to be reused, or to be run."""
    results = None
    if job.folder.exists() and not job.folder.is_dir():
        print(f"not reused: {job.folder} is not a folder", file=sys.stderr)
        plan.not_reused.append(job.name)
        return
    if not args.overwrite:
        try:
            results = load_results(plan, job.folder)
        except UserError as error:
            print(f"not reused: {error}", file=sys.stderr)
            plan.not_reused.append(job.name)
            return
    if results:
        plan.finished.append(results)
        return
    if args.overwrite and args.dry_run:
        job.command.append("--overwrite")
    plan.jobs.append(job)


def archive_old_runs(run_dir: Path, jobs: list[Job]) -> None:
    """Move old runs to RUN_DIR/overwritten: all of them, or none if one of them is running."""
    folders = [RunDir(job.folder) for job in jobs if job.folder.exists()]
    for folder in folders:
        folder.lock()  # until this function ends
    for folder in folders:
        if folder.contains_run():
            folder.archive(run_dir / "overwritten" / folder.path.name)


# ---------------------------------------------------------------- running it


def run_here(args, plan: Plan, stop: StopRequest) -> tuple[list[str], list[str]]:
    """Run the jobs on this machine; the names of the failed ones, and of those still to do."""
    # What is left, and the line that shows it.
    failed, problems, left = [], {}, {job.name for job in plan.jobs}
    line = ProgressLine(
        len(plan.finished) + len(plan.jobs), plan.finished, failed=len(plan.not_reused)
    )

    def results_of(job: Job) -> dict | None:
        try:
            return load_results(plan, job.folder)
        except UserError as error:
            problems[job.folder] = f": {error}"

    # What each outcome of a job means for both.
    def report(job: Job, outcome: str) -> None:
        if outcome in (DONE, FAILED):
            left.discard(job.name)
        if outcome == DONE:
            line.add(job.name, results_of(job))
        elif outcome == BUSY:
            line.say(f"{job.name} is being run by another process; waiting for it")
        elif outcome in (FAILED, RETRY):
            times = "failed twice" if job.failures and outcome == FAILED else "failed"
            line.say(
                f"{job.name} {times}{problems.get(job.folder, '')}; its output ends with\n"
                f"{last_output(job.folder)}" + ("\ntrying once more" if outcome == RETRY else "")
            )
        if outcome == FAILED:
            failed.append(job.name)
            line.failed += 1

    # Run until nothing waits.
    slots = make_slots(plan.jobs, args.jobs, args.gpus, cores=usable_cpus(), workers=plan.workers)
    LocalPool(
        slots,
        stop=lambda: stop.requested,
        report=report,
        polled=line.show,
        is_done=lambda job: results_of(job) is not None,
    ).run(plan.jobs)
    line.close()
    return failed, sorted(left)


def submit_all(args, plan: Plan) -> None:
    """Queue the jobs on Slurm, and say how to collect the results."""
    logs = args.run_dir / "slurm"
    array = submit(
        plan.jobs,
        logs,
        minutes=args.time,
        partition=args.partition,
        gpus=args.gpus_per_task,
        cpus=plan.workers + 1,
        max_parallel=args.max_parallel,
    )
    again = "the same command without --overwrite" if args.overwrite else "the same command"
    change = "" if Path.cwd() == ROOT else f"cd {shlex.quote(str(ROOT))} && "
    folder = args.run_dir if Path.cwd() == ROOT else args.run_dir.resolve()
    print(
        f"Slurm job array {array}: {len(plan.jobs)} runs. The output of each run is written to "
        f"output.log in its folder, Slurm's own to {logs}.\nTo queue what is missing by then: "
        f"{again} again. To write the table, now or when all are done:\n  "
        f"{change}python -m tools.report {shlex.quote(str(folder))} --dataset {plan.dataset}"
    )
    if plan.not_reused:
        print(f"not reused: {', '.join(plan.not_reused)}", file=sys.stderr)
        sys.exit(1)


def main(argv: list[str] | None = None) -> None:
    args, forwarded = parse_args(argv)

    # with --dry_run, standard output is for the commands alone: a program reads them
    with contextlib.redirect_stdout(sys.stderr if args.dry_run else sys.stdout):
        plan = make_plan(args, forwarded)
    if args.dry_run:
        for job in plan.jobs:
            print(shlex.join(job.command))
        return

    # record what is to be done
    try:
        args.run_dir.mkdir(parents=True, exist_ok=True)
        add_plan(
            args.run_dir,
            dataset=plan.dataset,
            models=args.models,
            folds=args.folds,
            seeds=args.seeds,
        )
        if args.overwrite:
            archive_old_runs(args.run_dir, plan.jobs)
    except OSError as error:
        raise UserError(f"--run_dir {args.run_dir} cannot be written ({error.strerror})") from error
    started = sum((job.folder / CONFIG).exists() for job in plan.jobs)
    print(
        f"{len(plan.configs)} runs: {len(plan.finished)} finished, {len(plan.jobs)} to do "
        f"({started} of them started), {len(plan.not_reused)} not reused"
    )

    # run it and write the table, which is of everything in RUN_DIR
    if args.launcher == "slurm" and plan.jobs:
        return submit_all(args, plan)
    stop = StopRequest()
    failed, left = run_here(args, plan, stop)
    notes = []
    if plan.not_reused:
        notes.append(
            "Not run, because the folder contains a run with other settings than those asked for, "
            f"or results that cannot be used: {', '.join(plan.not_reused)}."
        )
    print(write_tables(args.run_dir, dataset=plan.dataset, notes=notes))

    # what is left to do
    if left:
        again = "the same command without --overwrite" if args.overwrite else "the same command"
        raise Preempted(
            f"stopped by {stop.reason or 'a signal to a run'} with {len(left)} runs to "
            f"do: {again} continues the sweep"
        )
    if plan.not_reused + failed:
        print(f"failed or not reused: {', '.join(plan.not_reused + failed)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run(main)
