"""One page per image: what a TwistNet computes on it."""

import textwrap
from pathlib import Path

import torch

from data.transforms import normalise
from models.stci import HEADS, REDUCED
from sweeps.figures import new_figure
from tools.visualize.network import BlockView, describe_network
from tools.visualize.panels import (
    clear_axes,
    draw_directions,
    draw_evidence,
    draw_gates,
    draw_weights,
)

AUTHOR = "tools.visualize"  # in the metadata of every picture that this tool writes


def draw_page(
    path: Path, model, image: torch.Tensor, *, block: str, names: list[str], title: str
) -> None:
    """Draw one page for an image, uint8 [3, H, W], and write it to `path` as PNG.

    block: the TwistBlock that is shown in detail.  names: the network's classes.
    """
    # what the network computes
    logits, class_maps, views = describe_network(model, normalise(image[None]))
    probabilities, labels = logits[0].softmax(0).topk(min(3, len(names)))
    view, photo = views[block], image.permute(1, 2, 0).numpy()
    best = [
        f"{names[i]} {100 * p:.0f} %"
        for i, p in zip(labels.tolist(), probabilities.tolist(), strict=True)
    ]

    with new_figure(path, 9.2, author=AUTHOR) as figure:
        figure.suptitle(title, fontsize=10, fontweight="bold")
        top, middle, below = figure.subfigures(3, 1, height_ratios=[2.3, 5.9, 1.0])

        # top row: the input, the evidence, gates and AIS weights
        axes = top.subplots(1, 4, width_ratios=[1, 1, 0.9, 1.1])
        axes[0].imshow(photo)
        clear_axes(axes[0], f"Input, {photo.shape[1]} px")
        axes[0].set_xlabel("\n".join(best), fontsize=7.5)
        draw_evidence(axes[1], photo, class_maps[0, labels[0]].numpy(), names[labels[0]])
        draw_gates(axes[2], views, block)
        draw_weights(axes[3], view, block)

        # the directions of one block, and how to read them
        draw_directions(middle, view, photo.shape[:2])
        below.text(0.02, 0.45, explain(view, block), fontsize=7.5, va="center", linespacing=1.4)


def explain(view: BlockView, block: str) -> str:
    """How to read the page, for the network that it shows."""
    has_products = view.maps.shape[2] > REDUCED
    if not has_products:
        heads = "Each of STCI's four heads reduces the features to 8 channels, z; no products."
    elif view.kernels is None:
        heads = (
            "Each of STCI's four heads reduces the features to 8 channels, z, and multiplies them "
            "with each other at the same position (t = z, no step). A pair zi·tj is large (yellow) "
            "where channels i and j are both active."
        )
    else:
        heads = (
            "Each of STCI's four heads reduces the features to 8 channels, z, and shifts them one "
            "step in its direction, t (3 × 3 kernels; learnt: mean ± standard deviation over the "
            "8). A pair zi·tj is large (yellow) where channel i is active and channel j is active "
            "one step further."
        )
    ais = (
        ""
        if view.weights is None
        else "AIS multiplies each channel by a weight between 0 and 1, chosen for this image. "
    )
    text = (
        f"{heads} The maps show, in the frame of the input, the "
        f"{'pairs' if has_products else 'channels'} with the largest share of STCI's output in "
        f"{block}; the shares of all {view.maps.shape[2] * HEADS} channels sum to 100 %. {ais}The "
        "gate multiplies STCI's output before it is added to the block's main branch."
    )
    return textwrap.fill(text, 128)
