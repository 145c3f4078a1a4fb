"""The report of a sweep, and curves of running jobs.

    python -m tools.report runs/main                    # runs/main/report.html, report/, table.*
    python -m tools.report --curves checkpoints runs/main/dtd_fold1_twistnet18_seed42

Figures need matplotlib (pip install matplotlib); the page and its tables come without it.
"""

import argparse
import sys
from pathlib import Path

from common.errors import UserError
from common.files import check_outputs, write_atomic
from sweeps.curves import draw_curves, draw_gates, draw_learning
from sweeps.figures import AUTHOR_KEYS, draw_classes, draw_confusion, draw_paired, mark_of
from sweeps.grid import Sweep, read_sweep
from sweeps.page import build_page
from sweeps.results import read_log
from sweeps.rows import Row, best_label, footnotes, make_rows, pick_baseline
from sweeps.tables import write_table_files


def main() -> int:
    """Print where everything lies; 2 and one line on stderr for bad input."""
    args = parse_args()
    try:
        if args.curves:
            write_curves(args.curves, args.out)
        else:
            write_report(args.run_dir, args.dataset, args.baseline, args.data_dir)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors (common.cli's would load torch for a table)."""

    def error(self, message: str):
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def parse_args() -> argparse.Namespace:
    """One of RUN_DIR and --curves."""
    parser = Parser(
        prog="python -m tools.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", nargs="?", type=Path, help="folder of a sweep (its --run_dir)")
    parser.add_argument("--baseline", help="compare with this model (default: resnet18, or first)")
    parser.add_argument("--dataset", help="report on this one, where RUN_DIR holds several")
    parser.add_argument(
        "--data_dir",
        "--data-dir",
        type=Path,
        help="where the test images lie (default: where the runs had them)",
    )
    parser.add_argument(
        "--curves",
        nargs="+",
        type=Path,
        metavar="JOB",
        help="draw log.jsonl of these checkpoint or run folders instead",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("curves.png"),
        help="picture that --curves writes (.png, .pdf or .svg) (default: %(default)s)",
    )
    args = parser.parse_args()
    if (args.run_dir is None) == (args.curves is None):
        parser.error("give RUN_DIR, or --curves JOB [JOB ...]")
    return args


def write_report(
    run_dir: Path, dataset: str | None, baseline: str | None, data_dir: Path | None
) -> None:
    """Write table.md/.csv/.tex, report/*.png and report.html into run_dir."""
    sweep = read_sweep(run_dir, dataset=dataset)
    baseline = pick_baseline(sweep, baseline)
    rows = make_rows(sweep, baseline)
    notes = footnotes(sweep, rows, baseline)
    best = best_label(rows)
    print(write_table_files(sweep, baseline, run_dir))
    figures, missing = {}, None
    try:
        figures = draw_figures(sweep, rows, baseline, best)
    except UserError as error:
        missing = f"No figures: {error}"
        print(missing)
    page = build_page(
        sweep,
        rows,
        notes,
        baseline=baseline,
        best=best,
        figures=figures,
        missing=missing,
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
    """One PNG of the logs of all jobs; a folder of run folders stands for all of them."""
    if out.suffix not in AUTHOR_KEYS:
        raise UserError(f"--out {out}: the name must end in {', '.join(AUTHOR_KEYS)}")
    out.resolve().parent.mkdir(parents=True, exist_ok=True)
    check_outputs([out], flag="--out", mark=mark_of("tools.report"))
    logs = {}
    for job in jobs:
        found = [job] if (job / "log.jsonl").is_file() else log_folders(job)
        for folder in found:
            log = read_log(folder / "log.jsonl")
            if log:
                name = folder.resolve().name
                logs[str(folder) if name in logs else name] = log
            else:
                print(f"{folder}: no epoch in its log.jsonl yet")
    if not logs:
        raise UserError(f"no epoch yet in {', '.join(map(str, jobs))}: nothing to draw")
    draw_curves(out, logs)
    print(f"wrote {out}")


def log_folders(job: Path) -> list[Path]:
    """The folders right below with a log.jsonl."""
    found = sorted(path.parent for path in job.glob("*/log.jsonl"))
    if not found:
        raise UserError(f"{job} has no log.jsonl: give a checkpoint folder or a run folder")
    return found


if __name__ == "__main__":
    sys.exit(main())
