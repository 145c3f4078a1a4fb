"""The weights that a finished run hands on, with the JSON that says what they are."""

import json
import time
from pathlib import Path

import torch

from common.errors import Diverged
from common.files import sha256, write_atomic, write_json
from training.checkpoint import first_nonfinite, serialise
from training.run_dir import provenance


def write_weights(model: torch.nn.Module, about: dict, name: str, folders: list[Path]) -> None:
    """Write `name`.pt and `name`.json into each folder, byte for byte the same.

    `about` begins the JSON; its about["recipe"]["run"] tells this run's files from others', which
    are renamed and never overwritten. Raises Diverged for weights that are not finite.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    bad = first_nonfinite(state)
    if bad:
        raise Diverged(f"{bad} is not finite: the weights were not written")
    weights = serialise(state)
    about = {
        **about,
        "parameters": sum(p.numel() for p in model.parameters()),
        **provenance(),
        "sha256": sha256(weights),
    }
    for folder in folders:
        path = folder / f"{name}.pt"
        folder.mkdir(parents=True, exist_ok=True)
        make_way(path, about["recipe"]["run"])
        write_atomic(path, weights)
        write_json(path.with_suffix(".json"), about)
        print(f"wrote {path}", flush=True)


def make_way(path: Path, run: str) -> None:
    """Rename a weights file that another run wrote, with its JSON, by the date it was written."""
    about = path.with_suffix(".json")
    if not path.exists():
        return
    try:
        if json.loads(about.read_text())["recipe"]["run"] == run:
            return
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no JSON, or somebody else's: not this run's
    written = time.strftime("%Y-%m-%d_%H%M%S", time.localtime(path.stat().st_mtime))
    old = path.with_name(f"{path.stem}.{written}{path.suffix}")
    while old.exists():
        old = old.with_name(f"{old.stem}+{path.suffix}")
    path.rename(old)
    if about.exists():
        about.rename(old.with_suffix(".json"))
    print(f"{path} was another run's: it is now {old}", flush=True)
