"""The table of a sweep, mean ± std (n) a model, as Markdown, CSV and LaTeX.

Incomplete rows carry a † and the count of missing runs; their mean is over complete folds only.
"""

import csv
import io
from collections.abc import Collection, Sequence
from pathlib import Path

from common.files import write_atomic
from sweeps.grid import Sweep, read_sweep
from sweeps.rows import Row, counted, footnotes, make_rows, pick_baseline
from sweeps.statistics import Comparison, Summary

NONE = "–"
CSV_COLUMNS = [
    "model",
    "parameters",
    "mean",
    "std",
    "over",
    "folds",
    "seeds",
    "missing_runs",
    "baseline",
    "common_folds",
    "difference",
    "ci95_low",
    "ci95_high",
    "p",
    "p_holm",
    "p_sign_flip",
    "wins",
    "ties",
    "losses",
]
LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "±": r"$\pm$",
    "−": "$-$",
    "×": r"$\times$",
    "†": r"$^{\dagger}$",
    NONE: "--",
}


def write_tables(
    run_dir: Path,
    *,
    dataset: str,
    models: Sequence[str],
    folds: Sequence[int],
    seeds: Sequence[int],
    baseline: str | None = None,
    skip: Collection[str] = (),
) -> str:
    """Write table.md, .csv, .tex and runs.csv of this grid into run_dir; give back the Markdown.

    `skip` names run folders whose results are not to be counted (of other settings, say): they
    are missing in the table. The baseline is as `pick_baseline` says.
    """
    grid = {"dataset": dataset, "models": models, "folds": folds, "seeds": seeds}
    sweep = read_sweep(run_dir, **grid, skip=skip)
    return write_table_files(sweep, pick_baseline(sweep, baseline), Path(run_dir))


def write_table_files(sweep: Sweep, baseline: str, folder: Path) -> str:
    """Write table.md, .csv, .tex and runs.csv into a folder; give back the Markdown."""
    rows = make_rows(sweep, baseline)
    notes = footnotes(sweep, rows, baseline)
    markdown = to_markdown(rows, notes)
    write_atomic(folder / "table.md", markdown)
    write_atomic(folder / "table.csv", to_csv(rows, baseline))
    write_atomic(folder / "table.tex", to_latex(rows, notes))
    write_atomic(folder / "runs.csv", runs_csv(sweep))
    return markdown


def cells_of(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headers and text cells of the table; columns that would be empty everywhere are left out."""
    headers = ["Model", "Params (M)", "Test accuracy (%)"]
    several = len(rows) > 1
    tested = any(row.versus and row.versus.sign_flip_p is not None for row in rows)
    if several:
        headers += ["Difference [95 % CI]" if tested else "Difference"]
        headers += ["p", "p (Holm)", "p (sign-flip)"] if tested else []
        headers += ["W/T/L"]
    lines = []
    for row in rows:
        size = f"{row.parameters / 1e6:.2f}" if row.parameters else NONE
        line = [row.label, size, accuracy_text(row.summary)]
        if several:
            versus = row.versus
            line += [difference_text(versus)]
            ps = [versus.p, row.p_holm, versus.sign_flip_p] if versus else [None] * 3
            line += [p_text(p) for p in ps] if tested else []
            line += [f"{versus.wins}/{versus.ties}/{versus.losses}" if versus else NONE]
        lines.append(line)
    return headers, lines


def accuracy_text(summary: Summary) -> str:
    """mean ± std (folds × seeds), with a † where runs are missing."""
    mark = f" †{summary.missing} of {summary.runs} missing" if summary.missing else ""
    if summary.mean is None:
        return NONE + mark
    std = NONE if summary.std is None else f"{summary.std:.2f}"
    count = f"{counted(summary.folds, 'fold')} × {counted(summary.seeds, 'seed')}"
    return f"{summary.mean:.2f} ± {std} ({count}){mark}"


def difference_text(versus: Comparison | None) -> str:
    """+1.23 [+0.45, +2.01], in percentage points."""
    if versus is None:
        return NONE
    signed = [f"{x:+.2f}" for x in (versus.difference, versus.low, versus.high) if x is not None]
    text = signed[0] if len(signed) == 1 else f"{signed[0]} [{signed[1]}, {signed[2]}]"
    return text.replace("-", "−")


def p_text(p: float | None) -> str:
    """Three decimals."""
    return NONE if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def to_markdown(rows: Sequence[Row], notes: Sequence[str]) -> str:
    """A Markdown table that also reads well in a terminal, with its footnotes."""
    headers, lines = cells_of(rows)
    for row, line in zip(rows, lines, strict=True):
        if row.best:
            line[2] = f"**{line[2]}**"
    lines = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(headers, *lines, strict=True)]
    table = [headers, ["-" * width for width in widths], *lines]
    text = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in table
    ]
    return "\n".join([*text, "", *(f"- {note}" for note in notes), ""])


def to_latex(rows: Sequence[Row], notes: Sequence[str]) -> str:
    """A booktabs tabular; the footnotes stand above it as comments."""
    headers, lines = cells_of(rows)
    lines = [[latex(cell) for cell in line] for line in lines]
    for row, line in zip(rows, lines, strict=True):
        if row.best:
            line[2] = rf"\textbf{{{line[2]}}}"
    body = [" & ".join(line) + r" \\" for line in lines]
    head = " & ".join(latex(header) for header in headers) + r" \\"
    comments = [f"% {note}" for note in ["needs \\usepackage{booktabs}", *notes]]
    tabular = [rf"\begin{{tabular}}{{l{'r' * (len(headers) - 1)}}}", r"\toprule", head, r"\midrule"]
    return "\n".join([*comments, *tabular, *body, r"\bottomrule", r"\end{tabular}", ""])


def latex(text: str) -> str:
    """Text as LaTeX shows it."""
    return "".join(LATEX.get(letter, letter) for letter in text)


def to_csv(rows: Sequence[Row], baseline: str) -> str:
    """One line a model with every number of the table, unrounded; empty where there is none."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for row in rows:
        s, v = row.summary, row.versus
        line = [row.label, row.parameters, s.mean, s.std, s.unit, s.folds, s.seeds, s.missing]
        if v:
            line += [baseline, v.folds, v.difference, v.low, v.high, v.p, row.p_holm]
            line += [v.sign_flip_p, v.wins, v.ties, v.losses]
        else:
            line += [""] * 11
        writer.writerow(line)
    return stream.getvalue()


def runs_csv(sweep: Sweep) -> str:
    """One line a finished run of the grid, for statistics of one's own."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    columns = ["model", "fold", "seed", "test_acc", "val_acc", "best_epoch", "seconds"]
    writer.writerow(["row", *columns])
    for run in sweep.finished():
        writer.writerow([run.label, *(run.results.get(column) for column in columns)])
    return stream.getvalue()
