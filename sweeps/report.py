"""The report of a sweep as one HTML page that needs no other file (report.html.jinja)."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.files import printable
from common.optional import import_optional
from sweeps.comparison import Row, confused_pairs, confusion, mistaken_images
from sweeps.runs import IDENTITY_KEYS, Run, Sweep
from sweeps.tables import ACCURACY, accuracy_text, difference_text, p_text, table_cells, to_latex

TEMPLATE = Path(__file__).with_name("report.html.jinja")
THUMBNAIL = 224  # pixels
CAPTIONS = {
    "paired.png": "Left: test accuracy of every complete fold. Right: difference to the "
    "baseline; each mark is a fold, the upright stroke their mean, the bar its 95 % interval.",
    "learning.png": "Mean over the finished runs of a model (over the unfinished ones where none "
    "is finished); the band is ± 1 std. Training loss is on augmented, mixed images. The gradient "
    "norm, where it was logged, is the norm before clipping.",
    "classes.png": "Accuracy of each class minus the baseline's, over the runs finished in both; "
    "classes in the order of the first panel.",
    "confusion.png": "Over all finished runs of the model; each row adds up to 100 %. Shades are "
    "on a square-root scale, so that rare mistakes show.",
    "gates.png": "How much of the twisted interaction each TwistBlock lets through; mean over "
    "the runs, the band is ± 1 std. Blocks 1 and 2 are in stage 3, blocks 3 and 4 in stage 4; an "
    "untrained gate is at 0.119.",
}


@dataclass(frozen=True)
class Table:
    """A table of the page; the cells of `bold_column` are bold in the lines of `bold`."""

    headers: Sequence[str]
    lines: Sequence[Sequence]
    bold: Sequence[int] = ()
    bold_column: int = 0


def build_page(
    sweep: Sweep,
    rows: Sequence[Row],
    notes: Sequence[str],
    *,
    baseline: str,
    best: str | None,
    figures: Mapping[str, Path],
    problem: str | None = None,
    data_dir: Path | None = None,
) -> str:
    """The whole page as HTML.

    Args:
        figures: PNG files, by the names in CAPTIONS.
        problem: why there are no figures.
        data_dir: folder of the test images; None for where the runs found them.
    """
    jinja2 = import_optional("jinja2", purpose="writing report.html")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    headers, lines = table_cells(rows)
    return template.render(
        title=f"{sweep.dataset}: {', '.join(label for label in sweep.labels if '#' not in label)}",
        summary=summarise_in_words(rows, baseline, best, hours(sweep)),
        problem=problem,
        results=Table(
            headers, lines, [i for i, row in enumerate(rows) if row.best], headers.index(ACCURACY)
        ),
        notes=notes,
        latex=to_latex(rows, notes),
        folds=fold_table(sweep),
        captions=CAPTIONS,
        figures={name: embed(path) for name, path in figures.items()},
        baseline=baseline,
        best=best,
        mistakes=collect_mistakes(sweep.finished(best) if best else [], data_dir),
        provenance=provenance(sweep),
        runs=run_table(sweep),
    )


def summarise_in_words(
    rows: Sequence[Row], baseline: str, best: str | None, time_spent: float
) -> list[str]:
    """What was run, and the main finding."""
    models = [row.summary for row in rows if "#" not in row.label]  # other settings fill no gap
    total, missing = sum(s.runs for s in models), sum(s.missing for s in models)
    lines = [f"{total - missing} of {total} runs finished, {time_spent:.2f} hours of training."]
    top = next((row for row in rows if row.label == best), None)
    if top:
        others_incomplete = any(row.summary.missing for row in rows)
        among = " of a complete row" if others_incomplete and not top.summary.missing else ""
        line = f"Highest mean test accuracy{among}: {top.label}, {accuracy_text(top.summary)}"
        if top.versus:
            line += f"; {difference_text(top.versus)} points against {baseline}"
            line += "" if top.p_holm is None else f", p = {p_text(top.p_holm)} after Holm"
        lines.append((line + ".").replace("= <", "< "))
    return lines


def embed(path: Path) -> dict:
    """A PNG file of 200 pixels per inch for the page: base64, and its width at 128 per inch."""
    content = path.read_bytes()
    width = int.from_bytes(content[16:20], "big")  # in the PNG's header
    return {"data": base64.b64encode(content).decode(), "width": round(0.64 * width)}


# ---------------------------------------------------------------- tables


def fold_table(sweep: Sweep) -> Table:
    """Accuracy of every fold, with a † where seeds are missing."""
    lines = []
    for fold in sweep.folds:
        line = [f"fold {fold}"]
        for label in sweep.labels:
            accuracies = sweep.accuracies(label)
            seeds = sorted(seed for other, seed in sweep.expected(label) if other == fold)
            found = [accuracies[fold, seed] for seed in seeds if (fold, seed) in accuracies]
            if found and len(found) == len(seeds):
                line.append(f"{sum(found) / len(found):.2f}")
            else:
                line.append(", ".join(f"{x:.2f}" for x in found) + " †" if found else "–")
        lines.append(line)
    return Table(["", *sweep.labels], lines)


def hours(sweep: Sweep, label: str | None = None) -> float:
    """Hours that the finished runs of a row, or of all rows, took."""
    return sum(float(r.results.get("seconds") or 0) for r in sweep.finished(label)) / 3600


def provenance(sweep: Sweep) -> list[Table]:
    """Weights, settings, versions, commit and hours; no table where no run is finished."""
    runs = sweep.finished()
    if not runs:
        return []
    weights = []
    for label in dict.fromkeys(run.label for run in runs):
        own = sweep.finished(label)
        found = [distinct(own, "weights", k) for k in ("source", "sha256", "tensors_loaded")]
        weights.append([label, *found, f"{hours(sweep, label):.2f}"])
    names = {name for run in runs for name in run.results.get("settings") or {}}
    names = sorted(names - {"model", "fold", "seed"})
    settings = [[name, by_label(sweep, "settings", name)] for name in names]
    libraries = sorted({name for run in runs for name in run.results.get("versions") or {}})
    software = [[name, distinct(runs, "versions", name)] for name in libraries]
    software += [["commit", distinct(runs, "commit")]]
    software += [["first command", runs[0].results.get("command", "–")]]
    return [
        Table(["Model", "Weights from", "sha256", "Tensors loaded", "Hours"], weights),
        Table(["Setting", "Value"], settings),
        Table(["Software", ""], software),
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
    """One value if all rows share it, else one per row."""
    found = {label: distinct(sweep.finished(label), *keys) for label in sweep.labels}
    found = {label: value for label, value in found.items() if value}
    if len(set(found.values())) == 1 or keys[-1] in IDENTITY_KEYS:
        return distinct(sweep.finished(), *keys)
    return "; ".join(f"{label}: {value}" for label, value in found.items())


def run_table(sweep: Sweep) -> Table:
    """All runs one by one."""
    lines = []
    for run in sorted(sweep.runs, key=lambda run: run.folder.name):
        results = run.results or {}
        numbers = [results.get(key) for key in ("val_acc", "test_acc")]
        shown = [f"{x:.2f}" if isinstance(x, int | float) else "–" for x in numbers]
        state = "finished" if results else "not finished"
        lines.append([run.folder.name, run.label, *shown, results.get("best_epoch", "–"), state])
    return Table(["Folder", "Row", "Val (%)", "Test (%)", "Best epoch", ""], lines)


# ---------------------------------------------------------------- mistakes


def collect_mistakes(runs: Sequence[Run], data_dir: Path | None) -> dict:
    """The five most confused pairs of classes over these runs, with the images mistaken most often.

    Images are looked for in `data_dir`, or, if it is None, where the first run had its data. Those
    that are not there, or that cannot be read, are counted.
    """
    found = confusion(runs)
    if found is None:
        return {"pairs": []}
    classes, matrix = found
    tests = matrix.sum(axis=1)
    folder = Path(data_dir or (runs[0].results.get("settings") or {}).get("data_dir") or ".")
    mistakes = {"pairs": [], "folder": folder, "missing": 0, "unreadable": 0}
    for pair in confused_pairs(matrix):
        strips = []
        for true, other, times in ((pair.a, pair.b, pair.a_as_b), (pair.b, pair.a, pair.b_as_a)):
            words = f"{classes[true]} taken for {classes[other]}: {times} of {tests[true]} tests"
            images = []
            for file, wrong, of in mistaken_images(runs, true, other):
                path = find_image(folder, file)
                data = make_thumbnail(path) if path else None
                if data:
                    shown = printable(file)
                    images.append({"file": shown, "data": data, "times": wrong, "tests": of})
                else:
                    mistakes["unreadable" if path else "missing"] += 1
            strips.append({"words": words, "images": images})
        title = f"{classes[pair.a]} and {classes[pair.b]}: {100 * pair.share:.1f} %"
        mistakes["pairs"].append({"title": title + " taken for one another", "strips": strips})
    return mistakes


def find_image(folder: Path, file: str) -> Path | None:
    """A test image below the data folder, or below its images/; None where it is not there."""
    return next((p for p in (folder / file, folder / "images" / file) if p.is_file()), None)


def make_thumbnail(path: Path) -> str | None:
    """The middle of an image as a small square JPEG in base64; None if it cannot be read."""
    try:
        from PIL import Image, ImageOps

        from data.images import read_rgb  # imports torch, which the tables do not need

        image = Image.fromarray(read_rgb(path).permute(1, 2, 0).contiguous().numpy())
    except (OSError, ImportError):
        return None
    stream = io.BytesIO()
    ImageOps.fit(image, (THUMBNAIL, THUMBNAIL)).save(stream, "JPEG", quality=80)
    return base64.b64encode(stream.getvalue()).decode()
