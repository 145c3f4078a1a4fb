"""Draw what a TwistNet sees: one page a picture, or how its directions differ between classes.

  python -m tools.visualize --checkpoint runs/dtd_fold1_twistnet18_seed42/best.pt --out seen \\
      photo.jpg data/dtd/images

A picture, or a folder of them, gives a page a picture, OUT/<name>.png: the input as the network
gets it, where the evidence for its first choice lies, how far each block's gate is open, AIS's
weights, and for each direction of one block the kernel at its start and learnt, and the channel
pairs with the largest share in STCI's output as maps. A folder of class folders gives
OUT/ais_by_class.png, the mean AIS weight of each direction for each class, and OUT/ais_by_class.csv
with the numbers of all blocks. Needs matplotlib: pip install matplotlib
"""

import csv
import io
import math
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.cli import Parser, at_least, run
from common.errors import UserError
from common.files import write_atomic
from data.images import read_rgb
from data.splits import class_folders, list_images
from data.transforms import EvalTransform, normalise, trained_transform
from models.insight import View, channel_names, look_inside, twist_blocks
from models.stci import ANGLES, HEADS, REDUCED, direction_kernels
from models.weights import load_trained
from sweeps.figures import COLOURS, MARKERS, new_figure

ARROWS = ("→", "↘", "↓", "↙")
SHOWN = 3  # pairs a direction
MOST_CLASSES = 200  # in one figure
BATCH = 32
START_GATE = 1 / (1 + math.exp(2))


def parse_args(argv: list[str] | None):
    parser = Parser(prog="python -m tools.visualize", description=__doc__)
    parser.add_argument(
        "images",
        nargs="+",
        type=Path,
        metavar="IMAGE",
        help="image file, folder of images, or folder of class folders",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="FILE",
        help="best.pt of a run, or a weights file, of a TwistNet",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for the pictures; made if it is not there",
    )
    parser.add_argument(
        "--block",
        default="layer3.1",
        metavar="NAME",
        help="block to look into: layer3.0, layer3.1, layer4.0 or layer4.1; "
        "layer4's maps have a quarter of the positions",
    )
    parser.add_argument(
        "--img_size",
        type=at_least(32),
        metavar="PX",
        help="crop (default: that of the checkpoint, else 224)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    pictures, folders = find_images(args.images)
    model, about = load_trained(args.checkpoint)
    blocks = twist_blocks(model)
    if args.block not in blocks:
        raise UserError(f"--block {args.block}: there are {', '.join(blocks)}")
    if folders and blocks[args.block].stci.ais is None:
        raise UserError(f"{about['model']} has no AIS: there are no weights to compare by class")
    names = about["classes"] or [f"class {i}" for i in range(about["num_classes"])]
    reader, taken = Reader(trained_transform(about["config"], args.img_size)), set()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            image = reader.read(picture)
            if image is not None:
                page = free_name(args.out, picture.stem, taken)
                title = f"{picture.name} · {about['model']}"
                draw_page(page, model, image, block=args.block, names=names, title=title)
                print(f"wrote {page}", flush=True)
        for folder in folders:
            page = free_name(args.out, "ais_by_class", taken)
            compare_classes(page, model, folder, args.block, reader)
            print(f"wrote {page} and {page.with_suffix('.csv').name}")
    except OSError as error:
        raise UserError(f"{error.filename or args.out}: {error.strerror}") from error
    if reader.unread:
        print(f"{reader.unread} images cannot be read", file=sys.stderr)
        sys.exit(1)


class Reader:
    """Reads images as validation does, and counts those that it cannot read."""

    def __init__(self, transform: EvalTransform):
        self.transform, self.unread = transform, 0

    def read(self, path: Path) -> torch.Tensor | None:
        """uint8, 3 × H × W; None, with a line on stderr, for what is no image."""
        try:
            return self.transform(read_rgb(path))
        except OSError as error:
            self.unread += 1
            print(error, file=sys.stderr)
            return None


def find_images(places: list[Path]) -> tuple[list[Path], list[Path]]:
    """The single pictures, and the folders of class folders; UserError where there is neither."""
    pictures, folders = [], []
    for place in places:
        if not place.exists():
            raise UserError(f"{place}: no such file or folder")
        if not place.is_dir():
            pictures.append(place)
        elif names := class_folders(place):
            if len(names) > MOST_CLASSES:
                raise UserError(
                    f"{place}: {len(names)} class folders are more than a figure can "
                    f"show: give a folder with at most {MOST_CLASSES}"
                )
            folders.append(place)
        else:
            inside = [place / file for file in list_images(place, ".")]
            if not inside:
                raise UserError(f"{place}: no images in this folder")
            pictures += inside
    return pictures, folders


def free_name(folder: Path, stem: str, taken: set[str]) -> Path:
    """folder/stem.png, or with a number where this call has written one of that name."""
    name = next(
        name
        for i in range(1, len(taken) + 2)
        if (name := stem if i == 1 else f"{stem}-{i}") not in taken
    )
    taken.add(name)
    return folder / f"{name}.png"


def draw_page(path: Path, model, image: torch.Tensor, *, block: str, names: list[str], title: str):
    """One page: what the network makes of one image, uint8 3 × H × W."""
    logits, class_maps, views = look_inside(model, normalise(image[None]))
    chances, labels = logits[0].softmax(0).topk(min(3, len(names)))
    view, photo = views[block], image.permute(1, 2, 0).numpy()
    with new_figure(path, 9.2) as figure:
        figure.suptitle(title, fontsize=10, fontweight="bold")
        top, middle, below = figure.subfigures(3, 1, height_ratios=[2.3, 5.9, 1.0])
        axes = top.subplots(1, 4, width_ratios=[1, 1, 0.9, 1.1])
        axes[0].imshow(photo)
        bare(axes[0], f"Input, {photo.shape[1]} px")
        best = [
            f"{names[i]} {100 * p:.0f} %"
            for i, p in zip(labels.tolist(), chances.tolist(), strict=True)
        ]
        axes[0].set_xlabel("\n".join(best), fontsize=7.5)
        draw_evidence(axes[1], photo, class_maps[0, labels[0]].numpy(), names[labels[0]])
        draw_gates(axes[2], views, block)
        draw_weights(axes[3], view, block)
        draw_directions(middle, view, photo.shape[:2])
        below.text(0.02, 0.45, explanation(view, block), fontsize=7.5, va="center", linespacing=1.4)


def head_names(stepping: bool) -> list[str]:
    """What the four heads are called; without a step they have no direction."""
    if not stepping:
        return [f"head {k}" for k in range(1, HEADS + 1)]
    return [f"{arrow} {angle}°" for arrow, angle in zip(ARROWS, ANGLES, strict=True)]


def bare(axes, title: str) -> None:
    """A panel for a picture: no ticks, no frame."""
    axes.set_title(title, fontsize=8)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)


def draw_evidence(axes, photo: np.ndarray, class_map: np.ndarray, name: str) -> None:
    """The class activation map over the picture in grey."""
    height, width = photo.shape[:2]
    extent = (0, width, height, 0)
    axes.imshow(photo.mean(2), cmap="gray", extent=extent)
    shown = axes.imshow(
        class_map, cmap="cividis", alpha=0.6, extent=extent, interpolation="bilinear"
    )
    rows, columns = class_map.shape
    low, high = class_map.min(), class_map.max()
    if min(rows, columns) > 1 and low < high:  # a line, which a print in grey shows as well
        axes.contour(
            (np.arange(columns) + 0.5) * width / columns,
            (np.arange(rows) + 0.5) * height / rows,
            class_map,
            levels=[(low + high) / 2],
            colors="#ffffff",
            linewidths=1.2,
        )
    bare(axes, f"Evidence for {name}")
    bar = axes.figure.colorbar(shown, ax=axes, orientation="horizontal", pad=0.02, aspect=25)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("class activation; line: half way", fontsize=7)


def draw_gates(axes, views: dict[str, View], block: str) -> None:
    for place, (name, view) in enumerate(views.items()):
        axes.barh(place, view.gate, color=COLOURS[1] if name == block else COLOURS[6], height=0.6)
        axes.text(
            1,
            place,
            f"{view.gate:.3f}",
            transform=axes.get_yaxis_transform(),
            va="center",
            ha="right",
            fontsize=7.5,
        )
    axes.axvline(START_GATE, color="#000000", lw=1, ls=(0, (3, 2)))
    axes.set_yticks(range(len(views)), views, fontsize=7.5)
    axes.set_ylim(len(views) - 0.4, -0.6)
    axes.set_xlim(0, 1.6 * max(START_GATE, *(view.gate for view in views.values())))
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(axis="y", visible=False)
    axes.set_title("Gate of each block", fontsize=8)
    axes.set_xlabel("dashed: at the start", fontsize=7)


def draw_weights(axes, view: View, block: str) -> None:
    """AIS's weight of each channel, a row a direction, with the mean."""
    axes.set_title(f"AIS weights in {block}", fontsize=8)
    if view.weights is None:
        axes.text(0.5, 0.5, "no AIS in\nthis network", ha="center", va="center", fontsize=8)
        return bare(axes, axes.get_title())
    for place, weights in enumerate(view.weights[0]):
        weights = weights.numpy()
        for part, shade, marker, above in (
            (weights[:REDUCED], COLOURS[2], "o", 0.15),
            (weights[REDUCED:], COLOURS[1], "|", -0.15),
        ):
            axes.scatter(
                part,
                [place - above] * len(part),
                s=14,
                color=shade,
                marker=marker,
                lw=0.8,
                alpha=0.8,
            )
        axes.text(
            1.02,
            place,
            f"{weights.mean():.3f}",
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=7.5,
        )
    axes.set_yticks(range(HEADS), head_names(view.kernels is not None), fontsize=7.5)
    axes.set_ylim(HEADS - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_xlabel(
        "● z (orange)   | pairs (blue)   right: mean"
        if view.maps.shape[2] > REDUCED
        else "● z   right: mean",
        fontsize=7,
    )


def draw_directions(figure, view: View, size: tuple[int, int]) -> None:
    """A row a direction: kernel at the start, kernel learnt, maps of the strongest channels."""
    axes = figure.subplots(HEADS, 2 + SHOWN, width_ratios=[0.75, 0.75, *[1] * SHOWN])
    names = channel_names(view.maps.shape[2] > REDUCED)
    first = REDUCED if len(names) > REDUCED else 0  # the products, where there are any
    strongest = view.shares[0, :, first:].topk(SHOWN).indices + first
    maps = torch.stack([view.maps[0, k, channels] for k, channels in enumerate(strongest)])
    maps = maps.numpy()
    for k, channels in enumerate(strongest.tolist()):
        learnt = None if view.kernels is None else view.kernels[k]
        axes[k, 0].set_ylabel(
            head_names(learnt is not None)[k], fontsize=9, rotation=0, ha="right", va="center"
        )
        draw_kernel(axes[k, 0], None if learnt is None else direction_kernels()[k][None])
        draw_kernel(axes[k, 1], learnt)
        for panel, channel, values in zip(axes[k, 2:], channels, maps[k], strict=True):
            picture = panel.imshow(
                values,
                cmap="cividis",
                vmin=min(0, maps.min()),
                vmax=maps.max(),
                extent=(0, size[1], size[0], 0),
            )
            bare(panel, f"{names[channel]}   {100 * view.shares[0, k, channel]:.1f} %")
    axes[0, 0].set_title("step at the start", fontsize=8)
    axes[0, 1].set_title("step learnt", fontsize=8)
    above = f"Strongest {'pairs' if first else 'channels'}, with their share in STCI's output"
    axes[0, 3].set_title(f"{above}\n\n{axes[0, 3].get_title()}", fontsize=8)
    bar = figure.colorbar(picture, ax=axes[:, 2:], aspect=40, pad=0.01)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("value of the channel at each position", fontsize=7.5)


def draw_kernel(axes, kernels: torch.Tensor | None) -> None:
    """The mean of N × 3 × 3 kernels with its numbers; two words where the network has none."""
    bare(axes, "")
    if kernels is None:
        axes.text(0.5, 0.5, "no step", ha="center", va="center", fontsize=8)
        return
    mean, spread = kernels.mean(0).numpy(), kernels.std(0, correction=0).numpy()
    axes.imshow(mean, cmap="PuOr_r", vmin=-1, vmax=1)
    for (y, x), value in np.ndenumerate(mean):
        text = f"{value:.2f}".replace("-0.00", "0.00").replace("-", "−")
        if len(kernels) > 1:
            text += f"\n±{spread[y, x]:.2f}"
        axes.text(x, y, text, ha="center", va="center", fontsize=6.5)


def explanation(view: View, block: str) -> str:
    """How to read the page, for the network that it is of."""
    looks = "Each of STCI's four heads looks at the picture once: z, 8 channels; no products."
    products = view.maps.shape[2] > REDUCED
    if products and view.kernels is None:
        looks = (
            "Each of STCI's four heads has 8 channels, z, and multiplies each position with "
            "itself (t = z, no step). A pair zi·tj is large (yellow) where channels i and j "
            "are seen."
        )
    elif products:
        looks = (
            "In each direction STCI looks at the picture twice: z, 8 channels, and t, the "
            "same one step on in that direction (3 × 3 kernels; learnt: mean ± spread over "
            "the 8). A pair zi·tj is large (yellow) where channel i is seen and, one step "
            "on, channel j."
        )
    ais = (
        ""
        if view.weights is None
        else ("AIS multiplies each channel by its weight, 0 to 1, chosen for this picture. ")
    )
    text = (
        f"{looks} The maps, in the frame of the input, are those of the "
        f"{'pairs' if products else 'channels'} with the largest "
        f"share in STCI's output in {block}; the shares of all {view.maps.shape[2] * HEADS} "
        f"channels sum to 100 %. {ais}The gate multiplies STCI's output before it is added to "
        "the block's own."
    )
    return textwrap.fill(text, 128)


def compare_classes(path: Path, model, folder: Path, block: str, reader: Reader) -> None:
    """Draw the mean AIS weight of each direction by class; the .csv has those of all blocks."""
    classes = class_folders(folder)
    lines, found = [["class", "images", "block", "direction", "mean", "std"]], {}
    with new_figure(path, 1.3 + 0.19 * max(len(classes), 6)) as figure:
        for name in tqdm(classes, unit="class", disable=None):
            images = [folder / file for file in list_images(folder, name)]
            weights = class_weights(model, images, reader)  # N, blocks, 4
            if not len(weights):
                raise UserError(f"{folder / name}: no image that can be read")
            mean, std = weights.mean(0), weights.std(0, correction=1 if len(weights) > 1 else 0)
            found[name] = weights[:, list(twist_blocks(model)).index(block)]
            lines += [
                [name, len(weights), b, angle, f"{mean[i, k]:.6f}", f"{std[i, k]:.6f}"]
                for i, b in enumerate(twist_blocks(model))
                for k, angle in enumerate(ANGLES)
            ]
        stepping = twist_blocks(model)[block].stci.twist is not None
        draw_comparison(figure, found, block, head_names(stepping))
    text = io.StringIO(newline="")
    csv.writer(text).writerows(lines)
    write_atomic(path.with_suffix(".csv"), text.getvalue().encode("utf-8", "surrogateescape"))


def class_weights(model, images: list[Path], reader: Reader) -> torch.Tensor:
    """AIS's mean weight over a direction's channels: N, blocks, 4, of the images that are read."""
    rows = []
    for first in range(0, len(images), BATCH):
        batch = [
            image
            for path in images[first : first + BATCH]
            if (image := reader.read(path)) is not None
        ]
        if batch:
            _, _, views = look_inside(model, normalise(torch.stack(batch)))
            rows.append(torch.stack([view.weights.mean(2) for view in views.values()], 1))
    return torch.cat(rows) if rows else torch.empty(0)


def draw_comparison(figure, found: dict[str, torch.Tensor], block: str, heads: list[str]) -> None:
    """A panel a direction, a row a class: mean with its 95 % interval over the images."""
    panels = figure.subplots(1, HEADS, sharey=True)
    rows = range(len(found))
    means = torch.stack([x.mean(0) for x in found.values()]).numpy()  # classes, 4
    errors = torch.stack(
        [1.96 * x.std(0, correction=min(1, len(x) - 1)) / len(x) ** 0.5 for x in found.values()]
    ).numpy()
    centres = means.mean(0)
    # as wide for every direction, so that equal distances are equal differences
    reach = 1.1 * max((np.abs(means - centres) + errors).max(), 1e-6)
    for k, axes in enumerate(panels):
        axes.axvline(centres[k], color="#888888", lw=1, ls=(0, (3, 2)))
        axes.errorbar(
            means[:, k],
            rows,
            xerr=errors[:, k],
            fmt=MARKERS[k],
            ms=4.5,
            lw=1.2,
            color=COLOURS[1 + k],
        )
        axes.set_xlim(centres[k] - reach, centres[k] + reach)
        axes.set_title(heads[k])
        axes.tick_params(axis="x", labelsize=7.5)
        axes.locator_params(axis="x", nbins=3)
    panels[0].set_yticks(rows, [f"{name} ({len(x)})" for name, x in found.items()], fontsize=8)
    panels[0].set_ylim(len(found) - 0.5, -0.5)
    figure.suptitle(
        f"AIS weight of each direction in {block}, by class (images)",
        fontsize=10,
        fontweight="bold",
    )
    figure.supxlabel(
        "mean over the direction's channels and the class's images, with 95 % "
        "interval; dashed: mean of all classes",
        fontsize=8,
    )


if __name__ == "__main__":
    run(main)
