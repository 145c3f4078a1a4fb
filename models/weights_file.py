"""Read weights files that may come from anywhere, and compare their tensors with the networks."""

import hashlib
import io
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError
from models import MODELS
from models.authors_checkpoint import from_authors, is_authors

HEAD = ("fc.weight", "fc.bias")
SHOWN = 4  # tensors named in an error before "..."


@dataclass(frozen=True)
class WeightsFile:
    """The checked tensors of a file, and what a training checkpoint says beside them."""

    path: Path
    sha256: str
    tensors: dict[str, Tensor]
    config: dict | None
    classes: list[str] | None


def read_weights(path: Path) -> WeightsFile:
    """Read a plain state dict, {"state_dict": ...} or a training checkpoint; run nothing in it.

    UserError for a file that is damaged, carries code, or holds tensors that are not finite.
    """
    data = read_bytes(path)
    content = unpickle(path, data)
    holder = content if isinstance(content, dict) else {}
    state = holder
    for key in ("model", "state_dict", "model_state_dict"):
        if isinstance(holder.get(key), dict):
            state = holder[key]
            break
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no state dict: no names with tensors, as torch.save writes")
    tensors = plain_names(path, state)
    bad = [name for name, x in tensors.items() if not torch.isfinite(x).all()]
    if bad:
        counted = f"{len(bad)} of {len(tensors)} tensors are not finite ({some(bad)})"
        raise UserError(f"{path}: {counted}; these weights come from a run that diverged")
    config = holder.get("config") if isinstance(holder.get("config"), dict) else None
    classes = holder.get("classes") if isinstance(holder.get("classes"), list) else None
    return WeightsFile(path, hashlib.sha256(data).hexdigest(), tensors, config, classes)


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; no weights can be read") from None


def unpickle(path: Path, data: bytes) -> object:
    """Load without running code, after checking the records' CRCs, which torch.load does not."""
    damaged = f"{path} is damaged or no weights file"
    try:
        if zipfile.is_zipfile(io.BytesIO(data)):
            record = zipfile.ZipFile(io.BytesIO(data)).testzip()
            if record is not None:
                raise UserError(f"{damaged}: the checksum of its record {record} is wrong")
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|function|class) ([\w.]+)", str(error))
        if found is None:
            raise UserError(damaged) from None
        raise UserError(
            f"{path} carries code or objects ({found[1]}), not only tensors: refused, and nothing "
            "in it was run; ask for its plain state dict"
        ) from None
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise UserError(f"{damaged} ({type(error).__name__})") from None


def plain_names(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under this project's names: no wrappers' prefixes, authors' names translated."""
    for prefix in ("module.", "_orig_mod.") * 2:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): x for name, x in state.items()}
    return from_authors(path, state) if is_authors(state) else dict(state)


def shapes(name: str) -> dict[str, torch.Size]:
    """The names and shapes of a network's tensors, built without memory."""
    with torch.device("meta"):
        return {key: x.shape for key, x in MODELS[name](1).state_dict().items()}


def differences(
    tensors: dict[str, Tensor], wanted: dict[str, torch.Size]
) -> tuple[list[str], list[str], list[str]]:
    """Names missing from the tensors, unexpected in them, and of another shape; fc apart."""
    missing = [
        # BatchNorm's counter is younger than some files, torchvision's ResNet-18 among them
        name
        for name in wanted
        if name not in tensors and not name.endswith(".num_batches_tracked")
    ]
    unexpected = [name for name in tensors if name not in wanted]
    misshapen = [name for name, x in tensors.items() if x.shape != wanted.get(name, x.shape)]
    return tuple([n for n in names if n not in HEAD] for names in (missing, unexpected, misshapen))


def recognise(tensors: dict[str, Tensor], names: tuple[str, ...]) -> str | None:
    """The first of the networks whose tensors these are, all of them and no others; fc apart."""
    return next((name for name in names if not any(differences(tensors, shapes(name)))), None)


def misfit(file: WeightsFile, name: str) -> UserError:
    """The error that says which tensors of the file do not fit the network."""
    wanted = shapes(name)
    missing, unexpected, misshapen = differences(file.tensors, wanted)
    sized = [f"{n} {tuple(file.tensors[n].shape)} not {tuple(wanted[n])}" for n in misshapen]
    parts = [
        f"{len(found)} {word} ({some(found)})"
        for word, found in (("missing", missing), ("unexpected", unexpected), ("misshapen", sized))
        if found
    ]
    actual = recognise(file.tensors, tuple(MODELS))
    hint = f"; it holds {actual}" if actual else ""
    return UserError(f"{file.path} does not fit {name}: {', '.join(parts)}{hint}")


def some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
