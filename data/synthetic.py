"""Synthetic data: procedural textures, drawn with numpy from a seed and written as JPEG files.

A class is a kind of pattern. Angle, phase, scale, duty cycle, both colours, light and noise are
drawn for each image, so that the class shows in the shape and not in the colour. Image `index` of a
class depends only on (seed, split, class, index): it stays the same with more images, more classes
or in another order.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from common.errors import UserError

# One random stream per use, so that neither splits nor layouts share an image.
STREAMS = {"train": 0, "val": 1, "dtd": 2, "folds": 3}


def write_imagenet_tree(
    root: str | Path,
    *,
    train_per_class: int,
    val_per_class: int,
    size: int,
    seed: int,
    num_classes: int = 8,
) -> list[str]:
    """Write root/{train,val}/<class>/<class>_00001.JPEG, `size` pixels square.

    Returns the class names. Raises UserError where the class folders contain other files.
    """
    names = list(PATTERNS)[:num_classes]
    for split, count in (("train", train_per_class), ("val", val_per_class)):
        for label, name in enumerate(names):
            files = [f"{name}_{i:05d}.JPEG" for i in range(1, count + 1)]
            _write_class(Path(root) / split / name, files, (seed, STREAMS[split], label), size)
    return names


def write_dtd(
    root: str | Path,
    *,
    images_per_class: int,
    folds: int,
    size: int,
    seed: int,
    num_classes: int = 8,
) -> list[str]:
    """Write DTD's official layout, root/{images/<class>/*.jpg, labels/{train,val,test}K.txt}.

    Every fold K = 1..folds is a shuffle of each class's images into thirds; the remainder goes to
    train. Returns the class names. Raises UserError as write_imagenet_tree does.
    """
    # The images.
    names = list(PATTERNS)[:num_classes]
    for label, name in enumerate(names):
        files = [f"{name}_{i:04d}.jpg" for i in range(1, images_per_class + 1)]
        _write_class(Path(root) / "images" / name, files, (seed, STREAMS["dtd"], label), size)

    # The label files of each fold.
    third = images_per_class // 3
    wanted = [f"{split}{k}.txt" for k in range(1, folds + 1) for split in ("train", "val", "test")]
    _prepare_folder(Path(root) / "labels", wanted)
    for fold in range(1, folds + 1):
        lines = {"train": [], "val": [], "test": []}
        for label, name in enumerate(names):
            rng = np.random.default_rng([seed, STREAMS["folds"], label, fold])
            order = rng.permutation(images_per_class) + 1
            parts = {"val": order[:third], "test": order[third : 2 * third]}
            parts["train"] = order[2 * third :]
            for split, part in parts.items():
                lines[split] += [f"{name}/{name}_{i:04d}.jpg\n" for i in sorted(part)]
        for split, text in lines.items():
            (Path(root) / "labels" / f"{split}{fold}.txt").write_text("".join(text))
    return names


def draw(name: str, rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw one texture of class `name`, uint8 [size, size, 3], with random numbers from `rng`."""
    # The pattern, in coordinates that are rotated and scaled at random.
    angle, cycles = rng.uniform(0, 2 * np.pi), rng.uniform(3, 6)  # cycles across the image
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    x, y = axis[None, :], axis[:, None]
    u = cycles * (np.cos(angle) * x + np.sin(angle) * y) + rng.uniform(0, 100)
    v = cycles * (np.cos(angle) * y - np.sin(angle) * x) + rng.uniform(0, 100)
    height = PATTERNS[name](u, v, rng)  # [size, size], the colours meet at 0
    mask = 0.5 + 0.5 * np.tanh(rng.uniform(4, 12) * height)[..., None]

    # Colours, light and noise.
    ground, figure = _two_colours(rng)
    slope = rng.uniform(-0.3, 0.3, size=2)
    light = 1 + (slope[0] * x + slope[1] * y)[..., None]
    noise = rng.normal(0, rng.uniform(0.01, 0.03), size=(size, size, 1))
    image = (ground + (figure - ground) * mask) * light + noise
    return (255 * image.clip(0, 1) + 0.5).astype(np.uint8)


def _two_colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two muted RGB colours in [0, 1] whose brightness differs by at least 0.4.

    With vivid colours of any contrast a ResNet needs several times the steps to learn the shapes.
    """
    while True:
        ground, figure = 0.7 * rng.random((2, 1)) + 0.3 * rng.random((2, 3))
        if abs((ground - figure) @ (0.299, 0.587, 0.114)) > 0.4:
            return ground, figure


# Each pattern takes coordinates u, v [size, size] in periods, and returns heights [size, size] of
# about -1 to 1.


def _from_line(position: np.ndarray) -> np.ndarray:
    """Distance to the nearest integer, 0 to 0.5: a family of parallel lines."""
    return np.abs(position - np.round(position))


def _banded(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.sin(2 * np.pi * u) - rng.uniform(-0.5, 0.5)


def _blotchy(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    cells = rng.integers(6, 13)
    coarse = Image.fromarray(rng.normal(size=(cells, cells)).astype(np.float32))
    smooth = np.asarray(coarse.resize(u.shape[::-1], Image.Resampling.BICUBIC))
    return smooth - np.median(smooth) - rng.uniform(-0.3, 0.3)


def _bricked(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    row = np.floor(v)
    mortar = np.minimum(_from_line(v), 2 * _from_line(u / 2 + row / 2))
    return 4 * (rng.uniform(0.08, 0.15) - mortar)


def _chequered(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.sin(np.pi * u) * np.sin(np.pi * v) * 2


def _dotted(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return 4 * (rng.uniform(0.2, 0.36) - np.hypot(_from_line(u), _from_line(v)))


def _gridded(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return 4 * (rng.uniform(0.08, 0.15) - np.minimum(_from_line(u), _from_line(v)))


def _ringed(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    u, v = (w - w.mean() - rng.uniform(-1, 1) for w in (u, v))
    return np.sin(2 * np.pi * np.hypot(u, v) + rng.uniform(0, 2 * np.pi))


def _wavy(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    bend = rng.uniform(0.25, 0.4) * np.sin(2 * np.pi * v / rng.uniform(1.5, 2.5))
    return np.sin(2 * np.pi * (u + bend)) - rng.uniform(-0.5, 0.5)


def _woven(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    over = (np.floor(u) + np.floor(v)) % 2 == 0
    return np.sin(2 * np.pi * rng.integers(2, 4) * np.where(over, u, v))


def _zigzagged(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    bend = rng.uniform(1.6, 2.4) * _from_line(v / 2)
    return np.sin(2 * np.pi * (u + bend)) - rng.uniform(-0.5, 0.5)


PATTERNS = {  # in the order of the labels, by name
    "banded": _banded,
    "blotchy": _blotchy,
    "bricked": _bricked,
    "chequered": _chequered,
    "dotted": _dotted,
    "gridded": _gridded,
    "ringed": _ringed,
    "wavy": _wavy,
    "woven": _woven,
    "zigzagged": _zigzagged,
}


def _prepare_folder(folder: Path, wanted: list[str]) -> None:
    """Create `folder`; UserError if it contains other files than `wanted`, which would mix in."""
    folder.mkdir(parents=True, exist_ok=True)
    others = sorted({path.name for path in folder.iterdir()} - set(wanted))
    if others:
        raise UserError(f"{folder} contains other files ({others[0]}): give an empty folder")


def _write_class(folder: Path, files: list[str], stream: tuple[int, ...], size: int) -> None:
    _prepare_folder(folder, files)
    for index, file in enumerate(files, 1):
        image = draw(folder.name, np.random.default_rng([*stream, index]), size)
        Image.fromarray(image).save(folder / file, "JPEG", quality=90)
