"""The report of a sweep as one HTML page that needs no other file."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from sweeps.grid import Sweep
from sweeps.groups import NOT_HOW
from sweeps.markup import bullets, figure, section, table, text
from sweeps.mistakes import confused
from sweeps.results import Run
from sweeps.rows import Row
from sweeps.tables import accuracy_text, cells_of, difference_text, p_text, to_latex

CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #111; max-width: 64rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.4rem; }
h3 { font-size: 1rem; margin-bottom: .3rem; }
table { border-collapse: collapse; border-top: 2px solid; border-bottom: 2px solid;
        font-size: .85rem; font-variant-numeric: tabular-nums; margin: 1rem 0; }
th { border-bottom: 1px solid; text-align: left; vertical-align: bottom; }
th, td { padding: .25rem .7rem; }
td { vertical-align: top; overflow-wrap: anywhere; }
.words td:first-child { white-space: nowrap; } .numbers td { white-space: nowrap; }
.numbers td + td, .numbers th + th { text-align: right; }
.wide { overflow-x: auto; }
figure { margin: 1rem 0; break-inside: avoid; } figure > img { max-width: 100%; height: auto; }
figcaption, .notes { font-size: .85rem; color: #333; } .notes { padding-left: 1.2rem; }
.strip { display: flex; flex-wrap: wrap; gap: .5rem; margin: .3rem 0 .8rem; font-size: .75rem; }
.strip figure { margin: 0; width: 112px; } .strip p { width: 8rem; margin: 0; }
.strip p:only-child { width: auto; }
pre { overflow-x: auto; background: #f4f4f4; padding: .7rem; font-size: .75rem; }
@media print { body { max-width: none; margin: 0; } details { display: none; } }
"""
CAPTIONS = {
    "paired.png": "Left: test accuracy of every fold that is complete. Right: difference to the "
    "baseline; each mark is a fold, the upright stroke their mean, the bar its 95 % interval.",
    "learning.png": "Mean over the finished runs of a model (over the unfinished where none is "
    "finished), the band is ± 1 std. Training loss is on augmented, mixed images.",
    "classes.png": "Accuracy of each class minus the baseline's, over the runs finished in both; "
    "classes in the order of the first panel.",
    "confusion.png": "Over all finished runs of the model; each row adds up to 100 %. Shades are "
    "on a square-root scale, so that rare mistakes show.",
    "gates.png": "How much of the twisted interaction each TwistBlock lets through; mean over "
    "the runs, the band is ± 1 std. Blocks 1 and 2 are stage 3, blocks 3 and 4 stage 4; an "
    "untrained gate is at 0.119.",
}


def build_page(
    sweep: Sweep,
    rows: Sequence[Row],
    notes: Sequence[str],
    *,
    baseline: str,
    best: str | None,
    figures: Mapping[str, Path],
    missing: str | None = None,
    data_dir: Path | None = None,
) -> str:
    """The whole page. `figures` maps the names of CAPTIONS to PNG files; `missing` says why there
    are none. `data_dir` is where test images lie, None for where the runs found them."""
    title = f"{sweep.dataset}: {', '.join(label for label in sweep.labels if '#' not in label)}"
    draw = {name: figure(path, CAPTIONS[name]) for name, path in figures.items()}
    mistakes = confused(sweep.finished(best), data_dir) if best else ""
    sections = {
        "Results": [main_table(rows), bullets(notes), latex_block(rows, notes)],
        "Fold by fold": [draw.get("paired.png", ""), fold_table(sweep)],
        "Learning curves": [draw.get("learning.png", "")],
        f"Class by class, against {baseline}": [draw.get("classes.png", "")],
        f"What {best} confuses": [draw.get("confusion.png", ""), mistakes],
        "Gates": [draw.get("gates.png", "")],
        "How it was run": provenance(sweep),
        "Every run": [run_table(sweep)],
    }
    body = [f"<h1>{text(title)}</h1>"]
    body += [f"<p>{text(line)}</p>" for line in summary(rows, baseline, best, hours(sweep))]
    body += [f"<p><b>{text(missing)}</b></p>"] if missing else []
    body += [section(heading, *parts) for heading, parts in sections.items()]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{CSS}</style></head><body>\n'
        + "\n".join(part for part in body if part)
        + "\n</body></html>\n"
    )


def summary(rows: Sequence[Row], baseline: str, best: str | None, time_spent: float) -> list[str]:
    """What was run, and the main finding in words."""
    planned = [row.summary for row in rows if "#" not in row.label]  # the others fill no gap
    total, missing = sum(s.runs for s in planned), sum(s.missing for s in planned)
    lines = [f"{total - missing} of {total} runs finished, {time_spent:.2f} hours of training."]
    top = next((row for row in rows if row.label == best), None)
    if top:
        among = " of a complete row" if any(row.summary.missing for row in rows) else ""
        line = f"Highest mean test accuracy{among}: {top.label}, {accuracy_text(top.summary)}"
        if top.versus:
            line += f"; {difference_text(top.versus)} points against {baseline}"
            line += "" if top.p_holm is None else f", p = {p_text(top.p_holm)} after Holm"
        lines.append((line + ".").replace("= <", "< "))
    return lines


def main_table(rows: Sequence[Row]) -> str:
    """The table of the sweep, the best accuracy in bold."""
    headers, lines = cells_of(rows)
    return table(headers, lines, strong=[(i, 2) for i, row in enumerate(rows) if row.best])


def latex_block(rows: Sequence[Row], notes: Sequence[str]) -> str:
    """The table for a paper, folded away."""
    return f"<details><summary>LaTeX</summary><pre>{text(to_latex(rows, notes))}</pre></details>"


def fold_table(sweep: Sweep) -> str:
    """Accuracy of every fold, a † where seeds are missing."""
    cells = {label: sweep.accuracies(label) for label in sweep.labels}
    lines = []
    for fold in sweep.folds:
        line = [f"fold {fold}"]
        for label in sweep.labels:
            found = [cells[label][fold, s] for s in sweep.seeds if (fold, s) in cells[label]]
            whole = len(found) == len(sweep.seeds)
            partly = ", ".join(f"{x:.2f}" for x in found) + " †" if found else "–"
            line.append(f"{sum(found) / len(found):.2f}" if whole else partly)
        lines.append(line)
    return table(["", *sweep.labels], lines)


def hours(sweep: Sweep, label: str | None = None) -> float:
    """Hours that the finished runs of a row, or of all, took."""
    return sum(float(r.results.get("seconds") or 0) for r in sweep.finished(label)) / 3600


def provenance(sweep: Sweep) -> list[str]:
    """Weights, settings, versions, commit and hours, as tables."""
    runs = sweep.finished()
    if not runs:
        return ["<p>No run is finished yet.</p>"]
    weights = []
    for label in dict.fromkeys(run.label for run in runs):
        own = sweep.finished(label)
        found = [distinct(own, "weights", k) for k in ("source", "sha256", "tensors_loaded")]
        weights.append([label, *found, f"{hours(sweep, label):.2f}"])
    names = {name for run in runs for name in run.results.get("settings") or {}}
    names = sorted(names - {"model", "fold", "seed"})
    settings = [[name, by_label(sweep, "settings", name)] for name in names]
    libraries = sorted({name for run in runs for name in run.results.get("versions") or {}})
    made = [[name, distinct(runs, "versions", name)] for name in libraries]
    made += [["commit", distinct(runs, "commit")]]
    made += [["first command", runs[0].results.get("command", "–")]]
    return [
        table(["Model", "Weights from", "sha256", "Tensors loaded", "Hours"], weights, "words"),
        table(["Setting", "Value"], settings, "words"),
        table(["Made with", ""], made, "words"),
    ]


def distinct(runs: Sequence[Run], *keys: str) -> str:
    """The distinct values of results[key][key] over runs, in order of appearance."""
    values = {}
    for run in runs:
        value = run.results
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        values["none" if value is None else str(value)] = None
    return ", ".join(values)


def by_label(sweep: Sweep, *keys: str) -> str:
    """One value if all rows share it, else one a row."""
    found = {label: distinct(sweep.finished(label), *keys) for label in sweep.labels}
    found = {label: value for label, value in found.items() if value}
    if len(set(found.values())) == 1 or keys[-1] in NOT_HOW:
        return distinct(sweep.finished(), *keys)
    return "; ".join(f"{label}: {value}" for label, value in found.items())


def run_table(sweep: Sweep) -> str:
    """All runs one by one, folded away, those outside the grid too."""
    lines = []
    for run in sorted([*sweep.runs, *sweep.outside], key=lambda run: run.folder.name):
        results = run.results or {}
        state = "finished" if results else "not finished"
        state += ", outside the grid: not counted" if run in sweep.outside else ""
        numbers = [results.get(key) for key in ("val_acc", "test_acc")]
        shown = [f"{x:.2f}" if isinstance(x, int | float) else "–" for x in numbers]
        epoch = results.get("best_epoch", "–")
        lines.append([run.folder.name, run.label, *shown, epoch, state])
    headers = ["Folder", "Row", "Val (%)", "Test (%)", "Best epoch", ""]
    return f"<details><summary>{len(lines)} runs</summary>{table(headers, lines)}</details>"
