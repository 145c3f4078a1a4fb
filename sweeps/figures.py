"""The figures of a report, drawn with matplotlib (optional: pip install matplotlib).

Colours are Okabe and Ito's, told apart by colour-blind readers; lines and markers differ too,
so that a print in grey can be read. Widths are for a page of two columns.
"""

import io
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import write_atomic
from sweeps.classes import class_differences, confusion
from sweeps.grid import Sweep
from sweeps.rows import Row
from sweeps.statistics import Comparison, fold_means

COLOURS = ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
DASHES = ["-", (0, (5, 1.5)), (0, (3, 1, 1, 1)), (0, (1, 1))]
WIDTH = 7.2  # inches
SHARES = [0, 1, 5, 10, 20, 40, 60, 80, 100]  # ticks of the confusion's colour bar, percent
CHINESE = ["Noto Sans CJK SC", "Source Han Sans SC", "Microsoft YaHei", "PingFang SC", "SimHei"]
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


@contextmanager
def new_figure(path: Path, height: float, width: float = WIDTH, *, author: str = "tools.report"):
    """A matplotlib figure, height × width in inches, that is written to `path` when the block ends.

    The picture's metadata names `author`, the tool that writes it.
    """
    try:
        import matplotlib.font_manager
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("figures need matplotlib: pip install matplotlib") from error
    installed = matplotlib.font_manager.get_font_names()
    fonts = ["DejaVu Sans", *(name for name in CHINESE if name in installed)]
    with matplotlib.rc_context({**STYLE, "font.sans-serif": fonts}):
        figure = Figure(figsize=(width, height))
        yield figure
        picture, metadata = io.BytesIO(), {AUTHOR_KEYS[path.suffix]: mark_of(author).decode()}
        figure.savefig(picture, format=path.suffix[1:], metadata=metadata)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, picture.getvalue())


def colour(index: int) -> str:
    """The colour of the index-th thing of a figure."""
    return COLOURS[index % len(COLOURS)]


def draw_paired(path: Path, sweep: Sweep, rows: Sequence[Row], baseline: str) -> bool:
    """Fold by fold: accuracy of each model, and its difference to the baseline with 95 % CI."""
    means = {
        label: fold_means(sweep.accuracies(label), sweep.folds, sweep.seeds)
        for label in sweep.labels
    }
    versus = [row for row in rows if row.versus]
    if not versus:
        return False
    height = 1.3 + 0.24 * max(len(sweep.folds), 1.6 * len(versus), 4)
    with new_figure(path, height) as figure:
        left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
        draw_folds(left, sweep, {label: m for label, m in means.items() if m})
        gaps = {row: differences_by_fold(means[row.label], means[baseline]) for row in versus}
        apart = min(0.14, 0.12 * len(versus) / (height - 1.3))  # marks and bars at most 1/4 inch
        draw_differences(right, sweep, gaps, apart)
        right.set_title(f"Difference to {baseline}, by fold")
    return True


def differences_by_fold(own: Mapping[int, float], base: Mapping[int, float]) -> list[float]:
    """Differences over the folds that both have."""
    return [own[fold] - base[fold] for fold in sorted(own.keys() & base.keys())]


def draw_folds(axes, sweep: Sweep, means: Mapping[str, Mapping[int, float]]) -> None:
    """One line a fold, a marker a model, joined."""
    for fold in sweep.folds:
        found = [m[fold] for m in means.values() if fold in m]
        if found:
            y = sweep.folds.index(fold)
            axes.plot([min(found), max(found)], [y, y], color="#bbbbbb", lw=1.2, zorder=1)
    for label, values in means.items():
        index = sweep.labels.index(label)
        style = {"color": colour(index), "marker": MARKERS[index % len(MARKERS)]}
        places = [sweep.folds.index(fold) for fold in values]
        axes.scatter(values.values(), places, s=26, label=label, zorder=2, **style)
    axes.set_yticks(range(len(sweep.folds)), [f"fold {fold}" for fold in sweep.folds])
    axes.set_ylim(len(sweep.folds) - 0.5, -0.5)
    axes.set(xlabel="test accuracy (%)", title="Test accuracy, seeds averaged")
    axes.figure.legend(loc="outside lower center", ncols=min(3, len(means)))


def draw_differences(axes, sweep: Sweep, gaps: Mapping[Row, Sequence[float]], apart: float) -> None:
    """One line a model: a marker a fold, `apart` above them the mean with its interval."""
    for place, (row, values) in enumerate(gaps.items()):
        index = sweep.labels.index(row.label)
        style = {"color": colour(index), "marker": MARKERS[index % len(MARKERS)]}
        axes.scatter(values, [place + apart] * len(values), s=22, alpha=0.6, lw=0, **style)
        draw_interval(axes, place - apart, row.versus, colour(index))
    axes.axvline(0, color="#000000", lw=1)
    axes.set_yticks(range(len(gaps)), [row.label for row in gaps])
    axes.set_ylim(len(gaps) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("percentage points")


def draw_interval(axes, y: float, versus: Comparison, shade: str) -> None:
    """A mean difference with its 95 % interval, where there is one."""
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


def draw_classes(path: Path, sweep: Sweep, rows: Sequence[Row], baseline: str) -> bool:
    """Accuracy of each class minus the baseline's: a panel a model, the best model's first."""
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
            axes.set_title(label, fontsize=9 if len(found) < 4 else 6.5)
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
