"""Figures over epochs: learning curves, gates, and the logs of jobs that are still running."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from sweeps.figures import COLOURS, DASHES, WIDTH, colour, new_figure
from sweeps.grid import Sweep
from sweeps.results import Run, read_log


def series(
    logs: Sequence[Sequence[dict]], read: Callable
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Epochs, and mean and std over runs of read(entry) at each; an entry without it is skipped."""
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
    """A value of a log entry as a float, NaN where it is missing or no number."""
    try:
        return float(read(entry))
    except (KeyError, IndexError, TypeError, ValueError):
        return float("nan")


def band(axes, logs: Sequence[Sequence[dict]], read: Callable, **line) -> None:
    """Draw the mean over runs with a band of ± 1 std; a dot where there is one epoch only."""
    epochs, mean, std = series(logs, read)
    if len(epochs) == 1:
        line.setdefault("marker", "o")
    axes.plot(epochs, mean, **line)
    axes.set_xlabel("epoch")
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    if std.any():
        axes.fill_between(epochs, mean - std, mean + std, color=line["color"], alpha=0.18, lw=0)


def draw_learning(path: Path, sweep: Sweep) -> bool:
    """Validation accuracy and training loss over epochs, mean ± std over the runs of a model."""
    logs = {label: finished_logs(sweep, label) for label in sweep.labels}
    logs = {label: found for label, found in logs.items() if found}
    if not logs:
        return False
    with new_figure(path, 3.2) as figure:
        left, right = figure.subplots(1, 2)
        for label, found in logs.items():
            index = sweep.labels.index(label)
            line = {"color": colour(index), "ls": DASHES[index % len(DASHES)]}
            name = f"{label} ({len(found)} run{'s' * (len(found) != 1)})"
            if not sweep.finished(label):
                name += ", unfinished"
            band(left, found, lambda entry: entry["val_top1"], label=name, **line)
            band(right, found, lambda entry: entry["train_loss"], **line)
        left.set(ylabel="validation accuracy (%)")
        right.set(ylabel="training loss")
        figure.legend(loc="outside lower center", ncols=min(3, len(logs)))
    return True


def finished_logs(sweep: Sweep, label: str) -> list[list[dict]]:
    """Logs of a row's finished runs, or of the unfinished where none is finished."""
    runs: Sequence[Run] = sweep.finished(label) or [r for r in sweep.runs if r.label == label]
    return [log for run in runs if (log := read_log(run.folder / "log.jsonl"))]


def gate_count(entry: dict) -> int:
    """How many gates a log entry holds; 0 for networks without."""
    gates = entry.get("gates")
    return len(gates) if isinstance(gates, list) else 0


def draw_gates(path: Path, sweep: Sweep) -> bool:
    """sigmoid(gate) of each TwistBlock over epochs, mean ± std over the runs of a model."""
    logs = {label: finished_logs(sweep, label) for label in sweep.labels}
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
            axes.set(title=label, ylabel="sigmoid(gate)")
            axes.label_outer()
        low, high = panels[0].get_ylim()
        if high - low < 0.02:  # gates that stay where they are look so
            panels[0].set_ylim((low + high) / 2 - 0.01, (low + high) / 2 + 0.01)
        for axes in panels[len(labels) :]:
            axes.set_visible(False)
        figure.legend(loc="outside lower center", ncols=4)
    return True


def draw_curves(path: Path, jobs: Mapping[str, Sequence[dict]]) -> None:
    """Loss, accuracy, learning rate and images/s over epochs, a line a job: name → log."""
    with new_figure(path, 5.4 + 0.1 * len(jobs), 8.0) as figure:
        loss, accuracy, rate, speed = figure.subplots(2, 2, sharex=True).flat
        for index, (name, log) in enumerate(jobs.items()):
            line = {"color": colour(index + 1), "ls": DASHES[index // len(COLOURS) % 4]}
            dashed = {**line, "ls": (0, (2, 1.2)), "lw": 1, "mfc": "white"}
            band(loss, [log], lambda entry: entry["train_loss"], label=name, **line)
            band(loss, [log], lambda entry: entry["val_loss"], **dashed)
            band(accuracy, [log], lambda entry: entry["val_top1"], **line)
            band(accuracy, [log], lambda entry: entry["val_top5"], **dashed)
            band(rate, [log], lambda entry: entry["lr"], **line)
            band(speed, [log], lambda entry: entry["images_per_s"], **line)
        loss.set(ylabel="loss", title="training (solid), validation (dashed)")
        accuracy.set(ylabel="validation accuracy (%)", title="top-1 (solid), top-5 (dashed)")
        rate.set(ylabel="learning rate", ylim=(0, None))
        speed.set(ylabel="images/s", ylim=(0, None))
        figure.legend(loc="outside lower center", ncols=2)
