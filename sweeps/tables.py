"""The table of a sweep, mean ± std (folds × seeds) per model, as Markdown, CSV and LaTeX.

Incomplete rows have a † and the number of missing runs; their mean is over complete folds only.
"""

import csv
import errno
import io
from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError
from common.files import write_atomic
from sweeps.comparison import Row, count, footnotes, make_rows, pick_baseline
from sweeps.runs import Sweep, read_sweep
from sweeps.statistics import Comparison, Summary

NONE = "–"
ACCURACY = "Test accuracy (%)"
RUN_COLUMNS = ["model", "fold", "seed", "test_acc", "val_acc", "best_epoch", "seconds"]
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


def write_tables(run_dir: Path, *, dataset: str, notes: Sequence[str] = ()) -> str:
    """Write table.md, .csv, .tex and runs.csv of all runs of `dataset` in RUN_DIR.

    `notes` are added to the table's footnotes. Returns the Markdown.
    """
    sweep = read_sweep(run_dir, dataset=dataset)
    sweep.notes += notes
    baseline = pick_baseline(sweep)
    return write_table_files(sweep, make_rows(sweep, baseline), baseline, Path(run_dir))


def write_table_files(sweep: Sweep, rows: Sequence[Row], baseline: str, folder: Path) -> str:
    """Write table.md, .csv, .tex and runs.csv into a folder, and return the Markdown.

    Where they cannot be written, prints it and raises UserError, or OSError as on a full disk.
    """
    notes = footnotes(sweep, rows, baseline)
    markdown = to_markdown(rows, notes)
    try:
        write_atomic(folder / "table.md", markdown)
        write_atomic(folder / "table.csv", to_csv(rows, baseline))
        write_atomic(folder / "table.tex", to_latex(rows, notes))
        write_atomic(folder / "runs.csv", runs_csv(sweep))
    except OSError as error:
        print(markdown)
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(
                f"{folder} cannot be written ({error.strerror}): copy the runs to another folder "
                "to get files of this table"
            ) from error
        raise
    return markdown


def table_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headers and cells of the table as text; columns that would be empty are left out."""
    versus, several = [row.versus for row in rows], len(rows) > 1
    with_interval = any(each and each.low is not None for each in versus)
    difference = "Difference [95 % CI]" if with_interval else "Difference"
    columns = {
        "Model": [row.label for row in rows],
        "Params (M)": [f"{row.parameters / 1e6:.2f}" if row.parameters else NONE for row in rows],
    }
    if any(row.gmacs for row in rows):  # older results do not have them
        columns["GMACs"] = [f"{row.gmacs:.3f}" if row.gmacs else NONE for row in rows]
    columns[ACCURACY] = [accuracy_text(row.summary) for row in rows]
    if several:
        columns[difference] = [difference_text(each) for each in versus]
    if any(row.p_holm is not None for row in rows):
        columns["p (Holm)"] = [p_text(row.p_holm) for row in rows]
    if several:
        columns["W/T/L"] = [f"{v.wins}/{v.ties}/{v.losses}" if v else NONE for v in versus]
    return list(columns), [list(line) for line in zip(*columns.values(), strict=True)]


def accuracy_text(summary: Summary) -> str:
    """mean ± std (folds × seeds), with a † where runs are missing."""
    mark = f" †{summary.missing} of {summary.runs} missing" if summary.missing else ""
    if summary.mean is None:
        return NONE + mark
    std = NONE if summary.std is None else f"{summary.std:.2f}"
    over = f"{count(summary.folds, 'fold')} × {count(summary.seeds, 'seed')}"
    if summary.averaged != summary.folds * summary.seeds:  # some folds have more seeds than others
        over = f"{count(summary.averaged, 'run')} in {count(summary.folds, 'fold')}"
    return f"{summary.mean:.2f} ± {std} ({over}){mark}"


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
    """A Markdown table that can be read in a terminal too, with its footnotes."""
    headers, lines = table_cells(rows)
    accuracy = headers.index(ACCURACY)
    for row, line in zip(rows, lines, strict=True):
        if row.best:
            line[accuracy] = f"**{line[accuracy]}**"
    lines = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(headers, *lines, strict=True)]
    table = [headers, ["-" * width for width in widths], *lines]
    text = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in table
    ]
    return "\n".join([*text, "", *(f"- {note}" for note in notes), ""])


def to_latex(rows: Sequence[Row], notes: Sequence[str]) -> str:
    """A booktabs tabular, with the footnotes as comments above it."""
    headers, lines = table_cells(rows)
    accuracy = headers.index(ACCURACY)
    lines = [[latex(cell) for cell in line] for line in lines]
    for row, line in zip(rows, lines, strict=True):
        if row.best:
            line[accuracy] = rf"\textbf{{{line[accuracy]}}}"
    body = [" & ".join(line) + r" \\" for line in lines]
    head = " & ".join(latex(header) for header in headers) + r" \\"
    comments = [f"% {note}" for note in ["needs \\usepackage{booktabs}", *notes]]
    tabular = [rf"\begin{{tabular}}{{l{'r' * (len(headers) - 1)}}}", r"\toprule", head, r"\midrule"]
    return "\n".join([*comments, *tabular, *body, r"\bottomrule", r"\end{tabular}", ""])


def latex(text: str) -> str:
    """Escape text for LaTeX."""
    return "".join(LATEX.get(letter, letter) for letter in text)


def to_csv(rows: Sequence[Row], baseline: str) -> str:
    """One line per row with every number of the table, unrounded; empty where there is none."""
    lines = []
    for row in rows:
        summary, versus = row.summary, row.versus
        line = {
            "model": row.label,
            "parameters": row.parameters,
            "mean": summary.mean,
            "std": summary.std,
            "over": summary.unit,
            "folds": summary.folds,
            "seeds": summary.seeds,
            "missing_runs": summary.missing,
            "baseline": baseline if versus else None,
            "common_folds": versus.folds if versus else None,
            "difference": versus.difference if versus else None,
            "ci95_low": versus.low if versus else None,
            "ci95_high": versus.high if versus else None,
            "p": versus.p if versus else None,
            "p_holm": row.p_holm,
            "p_sign_flip": versus.sign_flip_p if versus else None,
            "wins": versus.wins if versus else None,
            "ties": versus.ties if versus else None,
            "losses": versus.losses if versus else None,
            "gmacs": row.gmacs,
        }
        lines.append(line)
    return write_csv(list(lines[0]), lines)


def runs_csv(sweep: Sweep) -> str:
    """One line per finished run, for statistics of your own."""
    lines = [{"row": run.label, **run.results} for run in sweep.finished()]
    return write_csv(["row", *RUN_COLUMNS], lines)


def write_csv(columns: Sequence[str], lines: Sequence[dict]) -> str:
    """These columns of the lines, as CSV with a header."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()
