"""Read a file of weights, whoever wrote it, without running anything in it."""

import argparse
import io
import pathlib
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.files import sha256
from common.optional import import_optional
from models.authors_checkpoint import has_authors_names, translate_names
from models.fitting import first_few

# Where checkpoints keep a state dict. An exponential moving average comes first, as in timm and
# torchvision, because it is what their accuracies are measured with.
EMA_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema")
STATE_KEYS = ("model", "state_dict", "model_state_dict", "model_state", "net", "network", "weights")
# Parts of a name that wrappers add: DataParallel and AveragedModel, torch.compile, FSDP, DeepSpeed.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# What a network is often called inside a larger module, such as Lightning's.
ATTRIBUTES = ("model.", "net.", "network.")
# Classes besides tensors that torch.load may build: they hold values and run nothing.
# timm and torchvision store argparse's Namespace, many scripts an accuracy from numpy.
HARMLESS = [
    argparse.Namespace,
    pathlib.PosixPath,
    torch.torch_version.TorchVersion,
    np.dtype,
    *(type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),  # numpy 1
]


@dataclass(frozen=True)
class WeightsFile:
    """The checked tensors of a file, and what a training checkpoint records beside them."""

    path: Path
    sha256: str
    tensors: dict[str, Tensor]  # under this project's names
    config: dict | None
    classes: list[str] | None
    ema: str | None  # a sentence about the moving average that was chosen; None where there is none


def read_weights(path: Path) -> WeightsFile:
    """Read a state dict (torch.save or safetensors), plain or inside a checkpoint.

    Takes the exponential moving average where the checkpoint has one. Raises UserError for a file
    that is damaged, carries code, contains no state dict, or has tensors that are not finite.
    """
    data = read_bytes(path)
    check_content(path, data)
    content = load_safetensors(path, data) if is_safetensors(path, data) else unpickle(path, data)
    checkpoint = content if isinstance(content, dict) else {}

    keys, state = find_state(checkpoint)
    if not is_state(state):
        entries = f" (its entries: {first_few([str(key) for key in checkpoint])})"
        raise UserError(
            f"{path} has no state dict{entries if checkpoint else ''}: expected tensors by name, "
            "as torch.save(model.state_dict(), path) writes"
        )

    tensors = unwrap_names(path, state)
    if has_authors_names(tensors):
        tensors = translate_names(path, tensors)
    bad = [name for name, x in tensors.items() if not torch.isfinite(x).all()]
    if bad:
        raise UserError(
            f"{path}: {len(bad)} of {len(tensors)} tensors are not finite ({first_few(bad)}); "
            "these weights come from a run that diverged"
        )
    return WeightsFile(
        path,
        sha256(data),
        tensors,
        config=checkpoint["config"] if isinstance(checkpoint.get("config"), dict) else None,
        classes=checkpoint["classes"] if isinstance(checkpoint.get("classes"), list) else None,
        ema=describe_ema(path, checkpoint, keys),
    )


# ---------------------------------------------------------------- from bytes to Python objects


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path} cannot be read as a weights file: {reason}") from None


def check_content(path: Path, data: bytes) -> None:
    """Raise UserError for what often takes the place of a file of weights, with the cure."""
    if not data:
        raise UserError(f"{path} is damaged: it is empty; download or copy it again")
    if data.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not the weights: run git lfs pull")
    if re.match(rb"\s*(<!doctype|<html|<\?xml)", data[:256], re.IGNORECASE):
        raise UserError(
            f"{path} is a web page, not weights: the link leads to a page, or needs a login; "
            "download the file itself"
        )


def is_safetensors(path: Path, data: bytes) -> bool:
    """Whether the content is safetensors' (a length, then JSON), or at least the name says so."""
    length = int.from_bytes(data[:8], "little")
    return path.suffix == ".safetensors" or (data[8:9] == b"{" and 8 + length <= len(data))


def load_safetensors(path: Path, data: bytes) -> dict[str, Tensor]:
    safetensors_torch = import_optional("safetensors.torch", purpose=f"reading {path}")
    try:
        return dict(sorted(safetensors_torch.load(data).items()))  # its own order is arbitrary
    except Exception as error:  # the reader raises SafetensorError, KeyError and others
        raise damaged(path, str(error)) from None


def unpickle(path: Path, data: bytes) -> object:
    """Load what torch.save wrote without running code, after checking the records' checksums.

    torch.load itself does not check the CRCs of the zip archive.
    """
    try:
        if zipfile.is_zipfile(io.BytesIO(data)):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                record, names = archive.testzip(), archive.namelist()
            if record is not None:
                raise damaged(path, f"the checksum of its record {record} is wrong")
            if any(name.endswith("/constants.pkl") for name in names):
                raise UserError(f"{path} is a TorchScript program: save its state_dict() instead")
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|function|class) ([\w.]+)", str(error))
        if found is None:
            raise damaged(path) from None
        raise UserError(
            f"{path} carries code or objects ({found[1]}), not only tensors: it is refused, and "
            "nothing in it was run; ask for its plain state dict"
        ) from None
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise damaged(path, type(error).__name__) from None


def damaged(path: Path, reason: str = "") -> UserError:
    detail = f" ({' '.join(reason.split())})" if reason else ""
    return UserError(
        f"{path} is damaged or is not a weights file{detail}: download or copy it again"
    )


# ---------------------------------------------------------------- from objects to tensors by name


def is_state(value: object) -> bool:
    """Whether a value is a state dict: names with tensors, and nothing else."""
    return isinstance(value, dict) and bool(value) and all(map(torch.is_tensor, value.values()))


def find_state(checkpoint: dict) -> tuple[tuple[str, ...], dict]:
    """The state dict inside a checkpoint, and the keys that lead to it."""
    if is_state(checkpoint):
        return (), checkpoint
    for key in EMA_KEYS + STATE_KEYS:
        if isinstance(checkpoint.get(key), dict):
            keys, state = find_state(checkpoint[key])
            if is_state(state):
                return (key, *keys), state
    return (), {}


def describe_ema(path: Path, checkpoint: dict, keys: tuple[str, ...]) -> str | None:
    """Which of a checkpoint's weights were taken, where one of them is a moving average."""
    if not any(key in EMA_KEYS for key in keys):
        return None
    others = [key for key in STATE_KEYS if isinstance(checkpoint.get(key), dict)]
    instead = f", not its {' or '.join(others)}" if others else ""
    return f"Took {'.'.join(keys)} (exponential moving average) of {path}{instead}"


def unwrap_names(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove from every name what wrappers and enclosing modules have added to it."""
    tensors = {}
    for name, tensor in state.items():
        if name == "n_averaged":  # AveragedModel's counter
            continue
        plain = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if plain in tensors:
            raise UserError(f"{path} has two tensors for {plain}, with and without a wrapper")
        tensors[plain] = tensor
    for attribute in ATTRIBUTES:
        if all(name.startswith(attribute) for name in tensors):
            tensors = {name.removeprefix(attribute): x for name, x in tensors.items()}
    return tensors
