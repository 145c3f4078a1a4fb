"""The classes that a model confuses most, with the images it mistook, as a part of the page."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from sweeps.classes import confused_pairs, confusion, mistaken_images
from sweeps.markup import text
from sweeps.results import Run


def confused(runs: Sequence[Run], data_dir: Path | None) -> str:
    """The five most confused pairs over these runs; nothing where they carry no confusion.

    Images are looked for in `data_dir`, None for where the runs had their data.
    """
    found = confusion(runs)
    pairs = confused_pairs(found[1]) if found else []
    if not pairs:
        return ""
    classes, matrix = found
    tests = matrix.sum(axis=1)
    folder = Path(data_dir or (runs[0].results.get("settings") or {}).get("data_dir") or ".")
    strips, lost = [], 0
    for pair in pairs:
        title = f"{classes[pair.a]} and {classes[pair.b]}"
        strips.append(f"<h3>{text(title)}: {100 * pair.share:.1f} % taken for one another</h3>")
        for true, other, count in ((pair.a, pair.b, pair.a_as_b), (pair.b, pair.a, pair.b_as_a)):
            words = f"{classes[true]} taken for {classes[other]}: {count} of {tests[true]} tests"
            images = mistaken_images(runs, true, other)
            shown = [thumbnail(folder, *image) for image in images]
            lost += shown.count("")
            strips.append(f'<div class="strip"><p>{text(words)}</p>{"".join(shown)}</div>')
    intro = (
        "The pairs of classes most often taken for one another, with the images mistaken most "
        "often; under each, in how many of its tests."
    )
    if lost:
        intro += f" {lost} images are not in {folder}: give their place with --data_dir."
    return f"<p>{text(intro)}</p>\n" + "\n".join(strips)


def thumbnail(folder: Path, file: str, times: int, tests: int) -> str:
    """An image with its count under it; "" if it is not to be had."""
    path = next((p for p in (folder / file, folder / "images" / file) if p.is_file()), None)
    data = encode(path) if path else None
    if data is None:
        return ""
    name = text(file)
    return (
        f'<figure><img width="112" height="112" alt="{name}" title="{name}" '
        f'src="data:image/jpeg;base64,{data}"><figcaption>{times} of {tests}</figcaption></figure>'
    )


def encode(path: Path, side: int = 224) -> str | None:
    """The middle of an image as a small square JPEG in base64; None if it cannot be read."""
    from PIL import Image, ImageOps

    stream = io.BytesIO()
    try:
        with Image.open(path) as image:
            ImageOps.fit(image.convert("RGB"), (side, side)).save(stream, "JPEG", quality=80)
    except (OSError, ValueError):
        return None
    return base64.b64encode(stream.getvalue()).decode()
