"""Which runs of a model belong together: those of equal settings and weights, and no others."""

import json
import re
from collections import Counter
from dataclasses import replace

from sweeps.results import Run

# settings that say where or which, not how: runs that differ only in these belong together
# (which weights were found is told by their sha256, and `data` differs from fold to fold)
NOT_HOW = {"model", "fold", "seed", "data", "pretrained"}
NOT_HOW |= {"run_dir", "data_dir", "workers", "device", "download", "overwrite"}


def settings_of(results: dict) -> dict:
    """What must be equal for runs to be averaged: how they trained, on which classes, from what."""
    how = {k: v for k, v in (results.get("settings") or {}).items() if k not in NOT_HOW}
    weights = results.get("weights") or {}
    how["weights"] = weights.get("sha256") or weights.get("source")
    return {**how, "classes": results.get("classes")}


def data_of(results: dict) -> object:
    """What tells the images and splits of a run from others: a fingerprint, or the test files."""
    return (results.get("settings") or {}).get("data") or results.get("test_files")


def label_groups(runs: list[Run]) -> tuple[list[Run], list[str]]:
    """Give runs of one model that differ in settings, weights or data labels of their own, and
    say so.

    The largest group keeps the model's name. Unfinished runs stay with it. Data is compared
    within a fold, with that of most runs.
    """
    labelled, notes = [run for run in runs if not run.results], []
    finished = [run for run in runs if run.results]
    usual = {fold: usual_data(finished, fold) for fold in {run.fold for run in finished}}
    for model in dict.fromkeys(run.model for run in finished):
        groups: dict[str, tuple[dict, list[Run]]] = {}
        for run in finished:
            if run.model == model:
                same = as_text(data_of(run.results)) == usual[run.fold]
                how = {**settings_of(run.results), "data": "as most" if same else "others"}
                groups.setdefault(as_text(how), (how, []))[1].append(run)
        ranked = sorted(groups.values(), key=lambda group: len(group[1]), reverse=True)
        for number, (how, group) in enumerate(ranked, 1):
            label = model if number == 1 else f"{model} #{number}"
            labelled += [replace(run, label=label) for run in group]
            if number > 1:
                names = ", ".join(run.folder.name for run in group[:3])
                more = f" and {len(group) - 3} more" if len(group) > 3 else ""
                change = differences(how, ranked[0][0])
                notes.append(f"{label} is kept apart from {model}: {change} ({names}{more})")
    return labelled, notes


def usual_data(runs: list[Run], fold: int) -> str:
    """The data that most runs of a fold have."""
    return Counter(as_text(data_of(r.results)) for r in runs if r.fold == fold).most_common(1)[0][0]


def as_text(value: object) -> str:
    """A value of results.json as something to compare and count."""
    return json.dumps(value, sort_keys=True)


def differences(how: dict, other: dict) -> str:
    """How settings differ: "epochs 10 instead of 100, …"."""
    changed = [key for key in sorted({*how, *other}) if how.get(key) != other.get(key)]
    changes = [f"{key} {brief(how.get(key))} instead of {brief(other.get(key))}" for key in changed]
    return ", ".join(changes)


def brief(value: object) -> str:
    """A value in at most 24 letters; a sha256 in its first 12."""
    text = f"{len(value)} names" if isinstance(value, list) else str(value)
    if re.fullmatch("[0-9a-f]{64}", text):
        return text[:12]
    return text if len(text) <= 24 else text[:23] + "…"
