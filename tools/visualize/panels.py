"""The panels of a page: evidence for a class, gates, AIS weights, kernels and channel maps."""

import math

import numpy as np
import torch

from models.stci import ANGLES, HEADS, REDUCED, direction_kernels
from sweeps.figures import COLOURS
from tools.visualize.network import BlockView, name_channels

ARROWS = ("→", "↘", "↓", "↙")
CHANNELS_SHOWN = 3  # per direction
INITIAL_GATE = 1 / (1 + math.exp(2))  # sigmoid(-2)


def name_heads(stepping: bool) -> list[str]:
    """The names of the four heads; without a step they have no direction."""
    if not stepping:
        return [f"head {k}" for k in range(1, HEADS + 1)]
    return [f"{arrow} {angle}°" for arrow, angle in zip(ARROWS, ANGLES, strict=True)]


def clear_axes(axes, title: str) -> None:
    """Turn axes into a panel for a picture: no ticks, no frame."""
    axes.set_title(title, fontsize=8)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)


def draw_evidence(axes, photo: np.ndarray, class_map: np.ndarray, name: str) -> None:
    """Draw a class activation map [h, w] over the image [H, W, 3] in grey."""
    height, width = photo.shape[:2]
    extent = (0, width, height, 0)
    axes.imshow(photo.mean(2), cmap="gray", extent=extent)
    shown = axes.imshow(
        class_map, cmap="cividis", alpha=0.6, extent=extent, interpolation="bilinear"
    )

    # a contour at half the range, which is visible in a greyscale print too
    rows, columns = class_map.shape
    low, high = class_map.min(), class_map.max()
    if min(rows, columns) > 1 and low < high:
        axes.contour(
            (np.arange(columns) + 0.5) * width / columns,
            (np.arange(rows) + 0.5) * height / rows,
            class_map,
            levels=[(low + high) / 2],
            colors="#ffffff",
            linewidths=1.2,
        )

    clear_axes(axes, f"Evidence for {name}")
    bar = axes.figure.colorbar(shown, ax=axes, orientation="horizontal", pad=0.02, aspect=25)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("class activation; line: half of its range", fontsize=7)


def draw_gates(axes, views: dict[str, BlockView], block: str) -> None:
    """Draw a bar per block: how much of STCI's output it adds; `block` is highlighted."""
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
    axes.axvline(INITIAL_GATE, color="#000000", lw=1, ls=(0, (3, 2)))
    axes.set_yticks(range(len(views)), views, fontsize=7.5)
    axes.set_ylim(len(views) - 0.4, -0.6)
    axes.set_xlim(0, 1.6 * max(INITIAL_GATE, *(view.gate for view in views.values())))
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(axis="y", visible=False)
    axes.set_title("Gate of each block", fontsize=8)
    axes.set_xlabel("dashed: initial value", fontsize=7)


def draw_weights(axes, view: BlockView, block: str) -> None:
    """Draw AIS's weight of each channel, one row per direction, with the mean."""
    title = f"AIS weights in {block}"
    axes.set_title(title, fontsize=8)
    if view.weights is None:
        axes.text(0.5, 0.5, "no AIS in\nthis network", ha="center", va="center", fontsize=8)
        clear_axes(axes, title)
        return

    # z above the line of its direction, the products below it
    for place, weights in enumerate(view.weights[0].numpy()):
        for part, shade, marker, above in (
            (weights[:REDUCED], COLOURS[2], "o", 0.15),
            (weights[REDUCED:], COLOURS[1], "|", -0.15),
        ):
            heights = [place - above] * len(part)
            axes.scatter(part, heights, s=14, color=shade, marker=marker, lw=0.8, alpha=0.8)
        axes.text(
            1.02,
            place,
            f"{weights.mean():.3f}",
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=7.5,
        )

    axes.set_yticks(range(HEADS), name_heads(view.kernels is not None), fontsize=7.5)
    axes.set_ylim(HEADS - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=7)
    has_products = view.maps.shape[2] > REDUCED
    products = "● z (orange)   | pairs (blue)   right: mean"
    axes.set_xlabel(products if has_products else "● z   right: mean", fontsize=7)


def draw_directions(figure, view: BlockView, size: tuple[int, int]) -> None:
    """Draw a row per direction: initial kernel, learnt kernel, maps of the strongest channels.

    size: height and width of the network's input in pixels, the frame of the maps.
    """
    columns = 2 + CHANNELS_SHOWN
    axes = figure.subplots(HEADS, columns, width_ratios=[0.75, 0.75, *[1] * CHANNELS_SHOWN])

    # the strongest products of each direction, or channels of z in a network without products
    names = name_channels(view.maps.shape[2] > REDUCED)
    first = REDUCED if len(names) > REDUCED else 0
    strongest = view.shares[0, :, first:].topk(CHANNELS_SHOWN).indices + first  # [4, shown]
    maps = torch.stack([view.maps[0, k, channels] for k, channels in enumerate(strongest)])
    maps = maps.numpy()  # [4, shown, h, w]

    for k, channels in enumerate(strongest.tolist()):
        learnt = None if view.kernels is None else view.kernels[k]
        axes[k, 0].set_ylabel(
            name_heads(learnt is not None)[k], fontsize=9, rotation=0, ha="right", va="center"
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
            clear_axes(panel, f"{names[channel]}   {100 * view.shares[0, k, channel]:.1f} %")

    # headings, and one colour bar for all maps
    axes[0, 0].set_title("initial step", fontsize=8)
    axes[0, 1].set_title("learnt step", fontsize=8)
    above = f"Strongest {'pairs' if first else 'channels'}, with their share of STCI's output"
    axes[0, 3].set_title(f"{above}\n\n{axes[0, 3].get_title()}", fontsize=8)
    bar = figure.colorbar(picture, ax=axes[:, 2:], aspect=40, pad=0.01)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("value of the channel at each position", fontsize=7.5)


def draw_kernel(axes, kernels: torch.Tensor | None) -> None:
    """Draw the mean of kernels [N, 3, 3] with its numbers; two words if the network has none."""
    clear_axes(axes, "")
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
