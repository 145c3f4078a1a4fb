"""How the AIS weights of the four directions differ between classes."""

import csv
import io
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.errors import UserError
from common.files import printable, write_atomic
from data.splits import list_images
from data.transforms import normalise
from models.stci import ANGLES, HEADS
from sweeps.figures import COLOURS, MARKERS, new_figure
from tools.visualize.network import describe_network, find_twist_blocks
from tools.visualize.page import AUTHOR
from tools.visualize.panels import name_heads

BATCH_SIZE = 32
COLUMNS = ["class", "images", "block", "direction", "mean", "std"]


def compare_classes(
    path: Path, model, folder: Path, classes: list[str], *, block: str, reader
) -> None:
    """Draw the mean AIS weight of each direction by class to `path`; its .csv has all blocks.

    folder: contains the folders `classes`.  reader: see Reader in __main__.py.
    """
    blocks = list(find_twist_blocks(model))

    # per class: AIS weights of all its images, and their statistics as rows of the CSV
    rows, weights_of_class = [COLUMNS], {}
    for name in tqdm(classes, unit="class", disable=None):
        images = [folder / file for file in list_images(folder, name)]
        weights = measure_weights(model, images, reader)  # [N, blocks, 4]
        if not len(weights):
            raise UserError(f"{printable(folder / name)}: none of its images can be read")
        weights_of_class[name] = weights[:, blocks.index(block)]
        mean, std = weights.mean(0), weights.std(0, correction=1 if len(weights) > 1 else 0)
        rows += [
            [name, len(weights), b, angle, f"{mean[i, k]:.6f}", f"{std[i, k]:.6f}"]
            for i, b in enumerate(blocks)
            for k, angle in enumerate(ANGLES)
        ]

    # the figure, and the numbers beside it
    stepping = find_twist_blocks(model)[block].stci.twist is not None
    with new_figure(path, 1.3 + 0.19 * max(len(classes), 6), author=AUTHOR) as figure:
        draw_comparison(figure, weights_of_class, block, name_heads(stepping))
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    write_atomic(path.with_suffix(".csv"), text.getvalue().encode("utf-8", "surrogateescape"))


def measure_weights(model, images: list[Path], reader) -> torch.Tensor:
    """The mean AIS weight over a direction's channels, [N, blocks, 4], of the readable images."""
    measured = []
    for first in range(0, len(images), BATCH_SIZE):
        read = [reader.read(path) for path in images[first : first + BATCH_SIZE]]
        batch = [image for image in read if image is not None]
        if batch:
            _, _, views = describe_network(model, normalise(torch.stack(batch)))
            measured.append(torch.stack([view.weights.mean(2) for view in views.values()], 1))
    return torch.cat(measured) if measured else torch.empty(0)


def draw_comparison(
    figure, weights_of_class: dict[str, torch.Tensor], block: str, heads: list[str]
) -> None:
    """Draw a panel per direction and a row per class: the mean with its 95 % interval.

    weights_of_class: name of a class -> [N images, 4 directions].
    """
    panels = figure.subplots(1, HEADS, sharey=True)
    rows = range(len(weights_of_class))
    means = torch.stack([x.mean(0) for x in weights_of_class.values()]).numpy()  # [classes, 4]
    errors = torch.stack(
        [
            1.96 * x.std(0, correction=min(1, len(x) - 1)) / len(x) ** 0.5
            for x in weights_of_class.values()
        ]
    ).numpy()
    centres = means.mean(0)

    # the same width for every direction, so that equal distances are equal differences
    reach = 1.1 * max((np.abs(means - centres) + errors).max(), 1e-6)
    for k, axes in enumerate(panels):
        axes.axvline(centres[k], color="#888888", lw=1, ls=(0, (3, 2)))
        style = {"fmt": MARKERS[k], "ms": 4.5, "lw": 1.2, "color": COLOURS[1 + k]}
        axes.errorbar(means[:, k], rows, xerr=errors[:, k], **style)
        axes.set_xlim(centres[k] - reach, centres[k] + reach)
        axes.set_title(heads[k])
        axes.tick_params(axis="x", labelsize=7.5)
        axes.locator_params(axis="x", nbins=3)

    labels = [f"{printable(name)} ({len(x)})" for name, x in weights_of_class.items()]
    panels[0].set_yticks(rows, labels, fontsize=8)
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.suptitle(
        f"AIS weight of each direction in {block}, by class (number of images)",
        fontsize=10,
        fontweight="bold",
    )
    figure.supxlabel(
        "mean over the direction's channels and the class's images, with 95 % interval; "
        "dashed: mean over all classes",
        fontsize=8,
    )
