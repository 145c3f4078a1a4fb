"""The figures of a report, drawn with matplotlib (optional: pip install matplotlib).

The colours are Okabe and Ito's, which colour-blind readers can tell apart; lines and markers differ
too, so that a print in grey can be read. Widths are for a page of two columns.
"""

import io
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from common.files import printable, write_atomic
from common.optional import import_optional
from sweeps.comparison import Row, class_differences, confusion, count, paired_means
from sweeps.runs import Sweep, read_log
from sweeps.statistics import Comparison, fold_means

COLOURS = ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
DASHES = ["-", (0, (5, 1.5)), (0, (3, 1, 1, 1)), (0, (1, 1))]
WIDTH = 7.2  # inches
LONGEST_NAME = 36  # characters of a model's or a run's name
SHARES = [0, 1, 5, 10, 20, 40, 60, 80, 100]  # ticks of the confusion's colour bar, percent
# Fonts for Chinese and Japanese, used where they are installed.
CJK_FONTS = [
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei"),
    *("WenQuanYi Zen Hei", "Microsoft YaHei", "PingFang SC", "SimHei"),
]
AUTHOR_KEYS = {".png": "Software", ".pdf": "Creator", ".svg": "Creator"}  # of the metadata
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "savefig.dpi": 200,
    "lines.linewidth": 1.4,
    "text.parse_math": False,
    "axes.formatter.useoffset": False,
    "figure.constrained_layout.use": True,
}


def mark_of(author: str) -> bytes:
    """What the file of every picture contains that the tool `author` writes."""
    return f"TwistNet-2D, python -m {author}".encode()


def shorten(name: str) -> str:
    """A name that leaves room for the figure; its end tells seeds and groups apart."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 16]}…{name[-15:]}"


@contextmanager
def new_figure(path: Path, height: float, width: float = WIDTH, *, author: str = "tools.report"):
    """A matplotlib figure, height × width in inches, that is written to `path` when the block ends.

    The picture's metadata names `author`, the tool that writes it.
    """
    matplotlib = import_matplotlib()
    installed = matplotlib.font_manager.get_font_names()
    fonts = ["DejaVu Sans", *(name for name in CJK_FONTS if name in installed)]
    with matplotlib.rc_context({**STYLE, "font.sans-serif": fonts}):
        figure = matplotlib.figure.Figure(figsize=(width, height))
        yield figure
        picture, metadata = io.BytesIO(), {AUTHOR_KEYS[path.suffix]: mark_of(author).decode()}
        with warnings.catch_warnings(record=True) as caught:  # two lines for each missing glyph
            warnings.simplefilter("always")
            figure.savefig(picture, format=path.suffix[1:], metadata=metadata)
        others = [each for each in caught if "missing from font" not in str(each.message)]
        if len(others) < len(caught):
            print(
                f"{path}: some characters are drawn as boxes, because no installed font has them: "
                "install one, such as Noto Sans CJK",
                file=sys.stderr,
            )
        for each in others:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, picture.getvalue())


def import_matplotlib():
    """matplotlib, imported without MPLBACKEND.

    A notebook sets that variable for its child processes, where the backend may not be installed.
    No backend is needed to write a file.
    """
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import_optional("matplotlib.figure", purpose="drawing figures")  # and what it imports
        return import_optional("matplotlib", purpose="drawing figures")
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend


def colour(index: int) -> str:
    """The colour of the index-th thing of a figure."""
    return COLOURS[index % len(COLOURS)]


# ---------------------------------------------------------------- fold by fold


def draw_paired(path: Path, sweep: Sweep, rows: Sequence[Row], baseline: str) -> bool:
    """Fold by fold: accuracy of each model, and its difference to the baseline with 95 % CI."""
    means = {
        label: fold_means(sweep.accuracies(label), sweep.expected(label)) for label in sweep.labels
    }
    versus = [row for row in rows if row.versus]
    if not versus:
        return False
    height = 1.3 + 0.24 * max(len(sweep.folds), 1.6 * len(versus), 4)
    with new_figure(path, height) as figure:
        left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
        draw_folds(left, sweep, {label: m for label, m in means.items() if m})
        gaps = {row: differences_by_fold(sweep, row.label, baseline) for row in versus}
        apart = min(0.14, 0.12 * len(versus) / (height - 1.3))  # marks and bars at most 1/4 inch
        draw_differences(right, sweep, gaps, apart)
        right.set_title(f"Difference to {baseline}, by fold")
    return True


def differences_by_fold(sweep: Sweep, label: str, baseline: str) -> list[float]:
    """Accuracy minus the baseline's in each fold that is complete in both, percentage points."""
    own, base = paired_means(sweep, label, baseline)
    return [own[fold] - base[fold] for fold in sorted(own.keys() & base.keys())]


def draw_folds(axes, sweep: Sweep, means: Mapping[str, Mapping[int, float]]) -> None:
    """One line per fold, with a marker per model."""
    for fold in sweep.folds:
        found = [m[fold] for m in means.values() if fold in m]
        if found:
            y = sweep.folds.index(fold)
            axes.plot([min(found), max(found)], [y, y], color="#bbbbbb", lw=1.2, zorder=1)
    for label, values in means.items():
        index = sweep.labels.index(label)
        style = {"color": colour(index), "marker": MARKERS[index % len(MARKERS)]}
        places = [sweep.folds.index(fold) for fold in values]
        axes.scatter(values.values(), places, s=26, label=shorten(label), zorder=2, **style)
    axes.set_yticks(range(len(sweep.folds)), [f"fold {fold}" for fold in sweep.folds])
    axes.set_ylim(len(sweep.folds) - 0.5, -0.5)
    axes.set(xlabel="test accuracy (%)", title="Test accuracy, seeds averaged")
    axes.figure.legend(loc="outside lower center", ncols=min(3, len(means)))


def draw_differences(axes, sweep: Sweep, gaps: Mapping[Row, Sequence[float]], apart: float) -> None:
    """One line per model: a marker per fold, and `apart` above them the mean with its interval."""
    for place, (row, values) in enumerate(gaps.items()):
        index = sweep.labels.index(row.label)
        style = {"color": colour(index), "marker": MARKERS[index % len(MARKERS)]}
        axes.scatter(values, [place + apart] * len(values), s=22, alpha=0.6, lw=0, **style)
        draw_interval(axes, place - apart, row.versus, colour(index))
    axes.axvline(0, color="#000000", lw=1)
    axes.set_yticks(range(len(gaps)), [shorten(row.label) for row in gaps])
    axes.set_ylim(len(gaps) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("percentage points")


def draw_interval(axes, y: float, versus: Comparison, shade: str) -> None:
    """A mean difference, with its 95 % interval where there is one."""
    mean = versus.difference
    if versus.low is not None:
        axes.plot([versus.low, versus.high], [y, y], color=shade, lw=2)
    axes.scatter([mean], [y], s=60, color=shade, marker="|", lw=2.5, zorder=3)
    axes.annotate(
        f"{mean:+.2f}".replace("-", "−"),
        (mean, y),
        xytext=(0, 6),
        textcoords="offset points",
        ha="center",
        fontsize=8,
        bbox={"facecolor": "white", "lw": 0, "pad": 0.6},
    )


# ---------------------------------------------------------------- class by class


def draw_classes(path: Path, sweep: Sweep, rows: Sequence[Row], baseline: str) -> bool:
    """Accuracy of each class minus the baseline's: one panel per model, the best model first."""
    compared = sorted((row for row in rows if row.versus), key=lambda row: -row.versus.difference)
    found = {row.label: class_differences(sweep, row.label, baseline) for row in compared}
    found = {label: gaps for label, gaps in found.items() if gaps}
    if not found:
        return False
    classes, first = next(iter(found.values()))
    order = np.argsort(np.nan_to_num(first), kind="stable")
    size = 9 if len(classes) <= 20 else 6.5
    with new_figure(path, 1.0 + max(1.5, 0.021 * size * len(classes))) as figure:
        panels = figure.subplots(1, len(found), sharex=True, sharey=True, squeeze=False)[0]
        for axes, (label, (names, gaps)) in zip(panels, found.items(), strict=True):
            gaps = dict(zip(names, gaps, strict=True))
            values = np.array([gaps.get(classes[i], np.nan) for i in order])
            shades = np.where(values < 0, "#D55E00", "#0072B2")
            axes.barh(range(len(order)), values, color=shades, height=0.72)
            axes.axvline(0, color="#000000", lw=0.8)
            axes.set_title(shorten(label), fontsize=9 if len(found) < 4 else 6.5)
            axes.grid(axis="y", visible=False)
        panels[0].set_yticks(range(len(order)), [classes[i] for i in order], fontsize=size)
        panels[0].set_ylim(-0.7, len(order) - 0.3)
        figure.supxlabel(
            f"accuracy of the class minus {baseline}'s (percentage points)", fontsize=9
        )
    return True


def draw_confusion(path: Path, sweep: Sweep, label: str) -> bool:
    """Confusion of one model over all its runs, in percent of the true class."""
    found = confusion(sweep.finished(label))
    if not found:
        return False
    classes, matrix = found
    share = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    few = len(classes) <= 12
    side = 4.6 if few else WIDTH
    with new_figure(path, side * 0.88, side) as figure:
        axes = figure.subplots()
        # on a square-root scale, as each mistake is a few percent only
        image = axes.imshow(np.sqrt(share), cmap="Blues", vmin=0, vmax=10)
        size = 9 if few else max(2.5, 5.5 * min(1, 47 / len(classes)))
        axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=size)
        axes.set_yticks(range(len(classes)), classes, fontsize=size)
        axes.grid(visible=False)
        axes.set(xlabel="predicted class", ylabel="true class")
        bar = figure.colorbar(image, shrink=0.8, label="% of the true class")
        bar.set_ticks(np.sqrt(SHARES), labels=SHARES)
        for (row, column), value in np.ndenumerate(share) if few else ():
            axes.text(
                column,
                row,
                f"{value:.0f}",
                ha="center",
                va="center",
                fontsize=8,
                color="#000000" if value < 40 else "#ffffff",
            )
    return True


# ---------------------------------------------------------------- over epochs


def series(
    logs: Sequence[Sequence[dict]], read: Callable
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Epochs, and mean and std over runs of read(entry) in each, [E] each.

    Entries in which the value is missing or not a finite number are skipped.
    """
    values: dict[int, list[float]] = {}
    for log in logs:
        for entry in log:
            value = number(read, entry)
            if np.isfinite(value):
                values.setdefault(int(entry["epoch"]), []).append(value)
    epochs = sorted(values)
    mean = np.array([np.mean(values[epoch]) for epoch in epochs])
    std = np.array([np.std(values[e], ddof=1) if len(values[e]) > 1 else 0.0 for e in epochs])
    return np.array(epochs), mean, std


def number(read: Callable, entry: dict) -> float:
    """A value of a log entry as a float; NaN where it is missing or not a number."""
    try:
        return float(read(entry))
    except (KeyError, IndexError, TypeError, ValueError, OverflowError):
        return float("nan")


def band(axes, logs: Sequence[Sequence[dict]], read: Callable, **line) -> None:
    """Draw the mean over runs with a band of ± 1 std; a dot where there is only one epoch."""
    epochs, mean, std = series(logs, read)
    if len(epochs) == 1:
        line.setdefault("marker", "o")
    axes.plot(epochs, mean, **line)
    axes.set_xlabel("epoch")
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    if std.any():
        axes.fill_between(epochs, mean - std, mean + std, color=line["color"], alpha=0.18, lw=0)


def draw_learning(path: Path, sweep: Sweep) -> bool:
    """Validation accuracy, training loss and gradient norm over epochs, mean ± std over runs."""
    logs = {label: row_logs(sweep, label) for label in sweep.labels}
    logs = {label: found for label, found in logs.items() if found}
    if not logs:
        return False
    with_norms = has_column(sum(logs.values(), []), "grad_norm")
    with new_figure(path, 3.2 if not with_norms else 2.9) as figure:
        accuracy, loss, *norms = figure.subplots(1, 3 if with_norms else 2)
        for label, found in logs.items():
            index = sweep.labels.index(label)
            line = {"color": colour(index), "ls": DASHES[index % len(DASHES)]}
            name = f"{shorten(label)} ({count(len(found), 'run')})"
            if not sweep.finished(label):
                name += ", unfinished"
            band(accuracy, found, lambda entry: entry["val_top1"], label=name, **line)
            band(loss, found, lambda entry: entry["train_loss"], **line)
            for axes in norms:
                draw_norms(axes, found, **line)
        accuracy.set(ylabel="validation accuracy (%)")
        loss.set(ylabel="training loss")
        figure.legend(loc="outside lower center", ncols=min(3, len(logs)))
    return True


def row_logs(sweep: Sweep, label: str) -> list[list[dict]]:
    """Logs of a row's finished runs, or of the unfinished ones where none is finished."""
    runs = sweep.finished(label) or [run for run in sweep.runs if run.label == label]
    return [log for run in runs if (log := read_log(run.folder))]


def has_column(logs: Sequence[Sequence[dict]], name: str) -> bool:
    """Whether any epoch of any log has this value; older logs have fewer columns."""
    return any(entry.get(name) is not None for log in logs for entry in log)


def draw_norms(axes, logs: Sequence[Sequence[dict]], **line) -> None:
    """Norm of the gradient before clipping: the median of an epoch's steps, and the maximum."""
    band(axes, logs, lambda entry: entry["grad_norm"], **line)
    thin = {**line, "ls": (0, (1, 1.5)), "lw": 0.9, "mfc": "white"}
    band(axes, logs, lambda entry: entry["grad_norm_max"], **thin)
    axes.set(yscale="log", ylabel="gradient norm", title="median; dotted: maximum")
    for axis_ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis_ticks(import_matplotlib().ticker.LogFormatter())  # plain numbers: 0.5, 1, 10


def gate_count(entry: dict) -> int:
    """Number of gates in a log entry; 0 for networks without gates."""
    gates = entry.get("gates")
    return len(gates) if isinstance(gates, list) else 0


def draw_gates(path: Path, sweep: Sweep) -> bool:
    """sigmoid(gate) of each TwistBlock over epochs, mean ± std over the runs of a model."""
    logs = {label: row_logs(sweep, label) for label in sweep.labels}
    blocks = {
        label: max((gate_count(entry) for log in found for entry in log), default=0)
        for label, found in logs.items()
    }
    labels = [label for label, count in blocks.items() if count]
    if not labels:
        return False
    columns = min(len(labels), 3)
    lines = -(-len(labels) // columns)
    width = WIDTH if len(labels) > 1 else 5.0
    with new_figure(path, 0.6 + 2.3 * lines, width) as figure:
        panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for axes, label in zip(panels, labels, strict=False):
            for block in range(blocks[label]):
                name = f"block {block + 1}" if label == labels[0] else None
                band(
                    axes,
                    logs[label],
                    lambda entry, block=block: entry["gates"][block],
                    color=colour(block + 1),
                    ls=DASHES[block % len(DASHES)],
                    label=name,
                )
            axes.set(title=shorten(label), ylabel="sigmoid(gate)")
            axes.label_outer()
        low, high = panels[0].get_ylim()
        if high - low < 0.02:  # do not zoom into noise
            panels[0].set_ylim((low + high) / 2 - 0.01, (low + high) / 2 + 0.01)
        for axes in panels[len(labels) :]:
            axes.set_visible(False)
        figure.legend(loc="outside lower center", ncols=4)
    return True


def draw_curves(path: Path, jobs: Mapping[str, Sequence[dict]]) -> None:
    """Loss, accuracy, learning rate, images/s and gradient norm over epochs: name → log."""
    rows = 3 if has_column(list(jobs.values()), "grad_norm") else 2
    with new_figure(path, 2.7 * rows + 0.1 * len(jobs), 8.0) as figure:
        loss, accuracy, rate, speed, *others = figure.subplots(rows, 2, sharex=True).flat
        norms, unused = others[:1], others[1:]
        for index, (name, log) in enumerate(jobs.items()):
            line = {"color": colour(index + 1), "ls": DASHES[index // len(COLOURS) % 4]}
            dashed = {**line, "ls": (0, (2, 1.2)), "lw": 1, "mfc": "white"}
            band(
                loss,
                [log],
                lambda entry: entry["train_loss"],
                label=shorten(printable(name)),
                **line,
            )
            band(loss, [log], lambda entry: entry["val_loss"], **dashed)
            band(accuracy, [log], lambda entry: entry["val_top1"], **line)
            band(accuracy, [log], lambda entry: entry["val_top5"], **dashed)
            band(rate, [log], lambda entry: entry["lr"], **line)
            band(speed, [log], lambda entry: entry["images_per_s"], **line)
            for axes in norms:
                draw_norms(axes, [log], **line)
        loss.set(ylabel="loss", title="training (solid), validation (dashed)")
        accuracy.set(ylabel="validation accuracy (%)", title="top-1 (solid), top-5 (dashed)")
        rate.set(ylabel="learning rate", ylim=(0, None))
        speed.set(ylabel="images/s", ylim=(0, None))
        for axes in unused:
            axes.set_visible(False)
            speed.tick_params(labelbottom=True)  # nothing is below it
        figure.legend(loc="outside lower center", ncols=2)
