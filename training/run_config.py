"""What one fine-tuning run is: the configuration that defines it.

Two runs with the same configuration give the same results. Nothing here imports torch, so that a
sweep can be tabulated on a machine without it.
"""

import contextlib
import re
from collections.abc import Collection
from pathlib import Path

from common.errors import UserError
from common.files import read_json
from training.results import read_results

CONFIG, LOG = "config.json", "log.jsonl"
NOT_COMPARED = ("data_dir", "num_folds")  # settings that do not change what a run computes


def load_config(folder: Path) -> dict | None:
    """The configuration of the run in `folder`, finished or not; None where there is no run."""
    results = None
    with contextlib.suppress(UserError):  # load_finished reports it
        results = read_results(folder)
    return config_of(results) if results else read_json(folder / CONFIG)


def adopt_precision(precision: str, folder: Path, amp: bool | None) -> str:
    """The precision of the run in `folder`, where there is one that --amp or --no_amp allow.

    A run keeps the precision of the machine that started it. `precision` is this machine's; `amp`
    is None where neither flag was given.
    """
    old = (load_config(folder) or {}).get("precision")
    is_allowed = old and (amp is None or amp == (old != "fp32"))
    return old if is_allowed else precision


def config_of(results: dict) -> dict:
    """The configuration in a results.json, which stores the weights beside the settings."""
    return {**(results.get("settings") or {}), "weights": results.get("weights")}


def comparable(config: dict, ignore: Collection[str] = NOT_COMPARED) -> dict:
    """A configuration without what does not count, and with its weights by their contents."""
    weights = config.get("weights")
    if isinstance(weights, dict):
        config = {**config, "weights": weights.get("sha256") or weights.get("source")}
    return {name: value for name, value in config.items() if name not in ignore}


def find_differences(
    old: dict, new: dict, ignore: Collection[str] = NOT_COMPARED
) -> dict[str, tuple]:
    """What two configurations differ in: name → (old value, new value)."""
    old, new = comparable(old, ignore), comparable(new, ignore)
    return {
        name: (old.get(name), new.get(name))
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    }


def describe_differences(old: dict, new: dict) -> str:
    """What two configurations differ in, as "epochs 100 → 10; lr 0.01 → 0.1"; "" if in nothing."""
    changes = find_differences(old, new)
    images = ["other images, labels or classes"] if changes.pop("data", None) else []
    return "; ".join([*images, *(f"{k} {brief(a)} → {brief(b)}" for k, (a, b) in changes.items())])


def brief(value: object) -> str:
    """A value in at most 24 characters; a sha256 by its first 12."""
    text = f"{len(value)} names" if isinstance(value, list) else str(value)
    if re.fullmatch("[0-9a-f]{64}", text):
        return text[:12]
    return text if len(text) <= 24 else text[:23] + "…"


def check_same_config(folder: Path, old: dict, new: dict) -> None:
    """Raise UserError if the run in `folder`, of configuration `old`, is not that of `new`."""
    changes = describe_differences(old, new)
    if changes:
        raise UserError(
            f"{folder} already contains a run with different settings ({changes}): "
            "archive it with --overwrite, or choose another --run_dir"
        )


def load_finished(folder: Path, config: dict) -> dict | None:
    """The results of the finished run of this configuration in `folder`, or None.

    Raises UserError where the folder contains a run of another configuration, finished or not, or
    results that cannot be used.
    """
    results = read_results(folder)
    old = config_of(results) if results else read_json(folder / CONFIG)
    if old:
        check_same_config(folder, old, config)
    return results
