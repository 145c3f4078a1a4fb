"""Write the report of a sweep, or draw the curves of running jobs.

  python -m tools.report runs/main           writes runs/main/report.html, report/ and table.*
  python -m tools.report --curves checkpoints runs/main/dtd_fold1_twistnet18_seed42

Intervals and p values need scipy, figures need matplotlib (pip install scipy matplotlib).
"""

import argparse
from pathlib import Path

from common.cli import Parser, run
from common.errors import UserError
from common.files import check_outputs, write_atomic
from sweeps.comparison import Row, best_label, footnotes, make_rows, pick_baseline
from sweeps.figures import (
    AUTHOR_KEYS,
    draw_classes,
    draw_confusion,
    draw_curves,
    draw_gates,
    draw_learning,
    draw_paired,
    mark_of,
)
from sweeps.report import build_page
from sweeps.runs import Sweep, read_log, read_sweep
from sweeps.tables import write_table_files
from training.run_config import LOG


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m tools.report", description=__doc__)
    parser.add_argument(
        "run_dir", nargs="?", type=Path, metavar="RUN_DIR", help="folder of a sweep"
    )
    parser.add_argument(
        "--baseline",
        metavar="MODEL",
        help="compare the other models with this one (default: resnet18, or else the first)",
    )
    parser.add_argument(
        "--dataset", metavar="NAME", help="which dataset, where RUN_DIR contains runs of several"
    )
    parser.add_argument(
        "--data_dir",
        type=Path,
        metavar="DIR",
        help="folder of the test images (default: where the runs found them)",
    )
    parser.add_argument(
        "--curves",
        nargs="+",
        action="extend",
        type=Path,
        metavar="JOB",
        help="draw the log.jsonl of these checkpoint or run folders instead of a report",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="picture that --curves writes, .png, .pdf or .svg (default: curves.png)",
    )
    args = parser.parse_args(argv)
    if (args.run_dir is None) == (args.curves is None):
        parser.error("give RUN_DIR, or --curves JOB [JOB ...]")
    others = ("out",) if args.run_dir else ("baseline", "dataset", "data_dir")
    for name in others:
        if getattr(args, name) is not None:
            parser.error(f"--{name} is for {'--curves' if args.run_dir else 'RUN_DIR'}")
    args.out = args.out or Path("curves.png")
    return args


def write_report(
    run_dir: Path, *, dataset: str | None, baseline: str | None, data_dir: Path | None
) -> None:
    """Write table.md/.csv/.tex, runs.csv, report/*.png and report.html into run_dir."""
    # the tables, which need neither matplotlib nor scipy
    sweep = read_sweep(run_dir, dataset=dataset)
    baseline = pick_baseline(sweep, baseline)
    rows = make_rows(sweep, baseline)
    best = best_label(rows)
    print(write_table_files(sweep, rows, baseline, run_dir))

    # the figures
    figures, problem = {}, None
    try:
        figures = draw_figures(sweep, rows, baseline, best)
    except UserError as error:
        problem = f"No figures: {error}"
        print(problem)

    # the page
    page = build_page(
        sweep,
        rows,
        footnotes(sweep, rows, baseline),
        baseline=baseline,
        best=best,
        figures=figures,
        problem=problem,
        data_dir=data_dir,
    )
    write_atomic(run_dir / "report.html", page)
    for path in (run_dir / "report.html", run_dir / "table.tex", *figures.values()):
        print(f"wrote {path}")


def draw_figures(sweep: Sweep, rows: list[Row], baseline: str, best: str | None) -> dict[str, Path]:
    """Draw into RUN_DIR/report what the runs have data for: name → file."""
    drawings = {
        "paired.png": lambda path: draw_paired(path, sweep, rows, baseline),
        "learning.png": lambda path: draw_learning(path, sweep),
        "classes.png": lambda path: draw_classes(path, sweep, rows, baseline),
        "confusion.png": lambda path: best and draw_confusion(path, sweep, best),
        "gates.png": lambda path: draw_gates(path, sweep),
    }
    figures = {}
    for name, draw in drawings.items():
        path = sweep.run_dir / "report" / name
        if draw(path):
            figures[name] = path
        else:
            path.unlink(missing_ok=True)  # of an earlier report
    return figures


def write_curves(jobs: list[Path], out: Path) -> None:
    """Draw the logs of all jobs into one picture; a folder of runs stands for all of them."""
    if out.suffix not in AUTHOR_KEYS:
        raise UserError(f"--out {out}: the name must end in {', '.join(AUTHOR_KEYS)}")
    out.resolve().parent.mkdir(parents=True, exist_ok=True)
    check_outputs([out], flag="--out", mark=mark_of("tools.report"))
    logs = {}
    for job in jobs:
        folders = [job] if (job / LOG).is_file() else find_logs(job)
        for folder in folders:
            log = read_log(folder)
            if log:
                name = folder.resolve().name
                logs[str(folder) if name in logs else name] = log
            else:
                print(f"{folder}: no epoch in its log.jsonl yet")
    if not logs:
        raise UserError(f"no epoch yet in {', '.join(map(str, jobs))}: nothing to draw")
    draw_curves(out, logs)
    print(f"wrote {out}")


def find_logs(job: Path) -> list[Path]:
    """The folders in `job` that have a log.jsonl."""
    found = sorted(path.parent for path in job.glob(f"*/{LOG}"))
    if not found:
        raise UserError(f"{job} has no log.jsonl: give a checkpoint folder or a run folder")
    return found


def main() -> None:
    args = parse_args()
    if args.curves:
        write_curves(args.curves, args.out)
    else:
        write_report(
            args.run_dir, dataset=args.dataset, baseline=args.baseline, data_dir=args.data_dir
        )


if __name__ == "__main__":
    run(main)
