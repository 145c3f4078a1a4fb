"""The weights file that a finished pretraining exports, and the JSON beside it."""

import time
from pathlib import Path

import torch

from common.errors import Diverged
from common.files import read_json, sha256, unused_path, write_atomic, write_json
from training.checkpoint import LATEST, find_nonfinite, serialise
from training.run_dir import provenance


def write_weights(model: torch.nn.Module, record: dict, name: str, folders: list[Path]) -> None:
    """Write the same `name`.pt and `name`.json into each folder.

    `record` is the beginning of the JSON. Its record["recipe"]["run"] identifies the run: files of
    another run are renamed, not overwritten. Raises Diverged for weights that are not finite.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    bad = find_nonfinite(state)
    if bad:
        raise Diverged(f"{bad} is not finite: the weights were not written")
    weights = serialise(state)
    record = {
        **record,
        "parameters": sum(p.numel() for p in model.parameters()),
        **provenance(),
        "sha256": sha256(weights),
    }
    for folder in folders:
        path = folder / f"{name}.pt"
        folder.mkdir(parents=True, exist_ok=True)
        archive_previous(path, record)
        write_atomic(path, weights)
        write_json(path.with_suffix(".json"), record)
        print(f"wrote {path}")


def archive_previous(path: Path, new: dict) -> None:
    """Rename the weights file of another run, with its JSON, by the date when it was written.

    A run whose checkpoint was copied to another folder counts as another one, unless the first
    folder is gone: then it was moved.
    """
    record = path.with_suffix(".json")
    if not path.exists():
        return
    written_by = read_json(record) or {}
    recipe, folder = written_by.get("recipe"), new.get("checkpoint_dir")
    is_same_run = isinstance(recipe, dict) and recipe.get("run") == new["recipe"]["run"]
    first = written_by.get("checkpoint_dir", folder)
    if is_same_run and (first == folder or not (Path(first) / LATEST).exists()):
        return
    written = time.strftime("%Y-%m-%d_%H%M%S", time.localtime(path.stat().st_mtime))
    old = unused_path(path.with_name(f"{path.stem}.{written}{path.suffix}"))
    path.rename(old)
    if record.exists():
        record.rename(old.with_suffix(".json"))
    print(f"{path} belonged to another run: it is now {old}")
