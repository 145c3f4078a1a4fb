"""Checkpoints under the names of the paper's authors, where every head is a module of its own."""

import re
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError
from models.stci import HEADS, REDUCED

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


def is_authors(state: dict[str, Tensor]) -> bool:
    return any(name.startswith("stem.") or ".mhstci." in name for name in state)


def from_authors(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under this project's names; UserError for what has no counterpart here."""
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
            ours[renamed(name, STEM)] = tensor
        elif parts[2] is None:
            ours[f"{parts[1]}.stci.{renamed(parts[3], STCI)}"] = tensor
        elif parts[3] in ("idx_i", "idx_j"):
            check_order(path, name, tensor)
        else:
            key = f"{parts[1]}.stci.{renamed(parts[3], HEAD)}"
            heads.setdefault(key, {})[int(parts[2])] = tensor
    return ours | {key: joined(path, key, found) for key, found in heads.items()}


def renamed(name: str, table: dict[str, str]) -> str:
    for theirs, new in table.items():
        if name.startswith(theirs):
            return new + name.removeprefix(theirs)
    return name


def joined(path: Path, key: str, found: dict[int, Tensor]) -> Tensor:
    """The four heads' tensors as one, head after head; a counter is the same in each."""
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
    """The products' order is part of the meaning of all that follows them."""
    i, j = torch.triu_indices(REDUCED, REDUCED)
    if not torch.equal(index.long(), i if name.endswith("idx_i") else j):
        raise UserError(f"{path}: {name} orders the channel pairs otherwise than 0-0, 0-1, ...")
