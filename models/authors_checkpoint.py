"""Translate checkpoints of the paper's authors, where every head is a module of its own."""

import re
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError
from models.stci import HEADS, REDUCED

# Their prefixes and this project's: of the stem, of an STCI, and of one of its heads.
STEM = {"stem.0.": "conv1.", "stem.1.": "bn1."}
STCI = {
    "ais.fc.2.": "ais.fc1.",
    "ais.fc.4.": "ais.fc2.",
    "norm.": "norm.",
    "proj.0.": "proj.",
    "proj.1.": "proj_bn.",
}
HEAD = {
    "reduce.0.": "reduce.",
    "reduce.1.": "reduce_bn.",
    "twist.dwconv.": "twist.conv.",
    "twist.scale": "twist.scale",
}
OWN_NAME = re.compile(r"(stem\.[01]|layer[1-4]\.[01]|fc)\.")  # without an STCI


def has_authors_names(state: dict[str, Tensor]) -> bool:
    if any(".mhstci." in name for name in state):
        return True
    # Their first-order network. Networks of timm may have a stem as well, but other layers.
    return "stem.0.weight" in state and all(OWN_NAME.match(name) for name in state)


def translate_names(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give a state dict this project's names; UserError for what has no counterpart here."""
    if not any(".mhstci." in name for name in state):
        raise UserError(
            f"{path} is the authors' twistnet18_first_order, which has no STCI at all: it is the "
            "plain ResNet-18 and is refused; use --model resnet18 with its own weights"
        )
    ours, heads = {}, {}
    for name, tensor in state.items():
        parts = re.fullmatch(r"(layer\d\.\d)\.mhstci\.(?:heads\.(\d)\.)?(.+)", name)
        if parts is None:
            tensor = tensor.reshape(()) if name.endswith(".gate") else tensor
            ours[rename(name, STEM)] = tensor
        elif parts[2] is None:
            ours[f"{parts[1]}.stci.{rename(parts[3], STCI)}"] = tensor
        elif parts[3] in ("idx_i", "idx_j"):
            check_order(path, name, tensor)
        else:
            key = f"{parts[1]}.stci.{rename(parts[3], HEAD)}"
            heads.setdefault(key, {})[int(parts[2])] = tensor
    return ours | {key: join_heads(path, key, found) for key, found in heads.items()}


def rename(name: str, table: dict[str, str]) -> str:
    """Replace the first prefix of the table that the name starts with."""
    for theirs, new in table.items():
        if name.startswith(theirs):
            return new + name.removeprefix(theirs)
    return name


def join_heads(path: Path, key: str, found: dict[int, Tensor]) -> Tensor:
    """Concatenate the four heads' tensors; a BatchNorm's counter is the same in each of them."""
    if sorted(found) != list(range(HEADS)):
        raise UserError(f"{path}: {key} has heads {sorted(found)}, not 0 to {HEADS - 1}")
    tensors = [found[k] for k in range(HEADS)]
    if key.endswith(".num_batches_tracked"):
        return tensors[0]
    if key.endswith(".scale"):
        tensors = [x.flatten() for x in tensors]
    if any(x.dim() == 0 or x.shape[1:] != tensors[0].shape[1:] for x in tensors):
        raise UserError(f"{path}: the heads of {key} differ in shape")
    return torch.cat(tensors)


def check_order(path: Path, name: str, index: Tensor) -> None:
    """Raise UserError for products in another order, which all later layers depend on."""
    i, j = torch.triu_indices(REDUCED, REDUCED)
    if not torch.equal(index.long(), i if name.endswith("idx_i") else j):
        raise UserError(f"{path}: {name} has the channel pairs in another order than 0-0, 0-1, ...")
