"""Find pretrained weights, load them, and print what was loaded."""

import sys
from pathlib import Path

from torch import Tensor, nn

from common.errors import UserError
from common.files import read_json, sha256
from models import MODELS
from models.fitting import HEAD, check_head, load_fitting, misfit_error, recognise, shorten
from models.torchvision_weights import SOURCE, fetch_resnet18, load_resnet, load_twistnet_stem
from models.weights_file import WeightsFile, read_bytes, read_weights

SCRIPT_DIR = Path(__file__).resolve().parent.parent
TITLES = {"resnet18": "ResNet-18", "seresnet18": "SE-ResNet-18"}  # all others are TwistNet
# Networks that may be filled in part, and with whose weights.
PARTIAL = {
    "seresnet18": "resnet18",
    "twistnet18_no_spiral": "twistnet18",
    "twistnet18_no_ais": "twistnet18",
    "twistnet18_first_order": "twistnet18",
}


# ---------------------------------------------------------------- finding


def candidate_paths(name: str) -> list[Path]:
    """The files that "auto" looks for, in order; an ablation also takes TwistNet-18's."""
    names = [name]
    if PARTIAL.get(name) == "twistnet18":
        names.append("twistnet18")
    return [
        folder / f"{stem}_imagenet.pt"
        for stem in names
        for folder in (Path("weights"), SCRIPT_DIR / "weights")
    ]


def find_weights(name: str) -> Path | None:
    """The weights file that "auto" uses for a network, or None for torchvision's ResNet-18."""
    return next((path for path in candidate_paths(name) if path.is_file()), None)


def resolve_path(name: str, pretrained: str) -> Path | None:
    """The file that "auto" or a path stands for; None for torchvision's. UserError if missing."""
    if pretrained == "auto":
        return find_weights(name)
    path = Path(pretrained)
    if not path.is_file():
        problem = "this is a folder, not a file" if path.is_dir() else "there is no such file"
        raise UserError(f"--pretrained {pretrained}: {problem} (give a path, auto, or none)")
    return path


def weights_identity(name: str, pretrained: str = "auto") -> dict[str, str | None]:
    """What load_pretrained would load, {"source", "sha256"}, without building anything."""
    if pretrained == "none":
        return {"source": "none", "sha256": None}
    path = resolve_path(name, pretrained)
    if path is None:
        return {"source": SOURCE, "sha256": None}
    return {"source": str(path), "sha256": sha256(read_bytes(path))}


# ---------------------------------------------------------------- loading


def load_pretrained(
    model: nn.Module, name: str, pretrained: str | Path = "auto", *, keep_head: bool = False
) -> dict:
    """Load pretrained weights into the network `name`, print what was loaded, and return it.

    Args:
        model: the network, as build_model(name, num_classes) returns it.
        pretrained: "auto" searches weights/ here and beside the scripts, then takes torchvision's
            ResNet-18 weights; "none" loads nothing; anything else is the path of a file.
        keep_head: also load the classifier, for evaluation; fine-tuning starts a new one.

    Returns {"source", "sha256", "tensors_loaded"}; sha256 is None without a file.
    Raises UserError for a file that is missing, damaged, or does not fit the network.
    """
    pretrained = str(pretrained)
    if pretrained == "none":
        return {"source": "none", "sha256": None, "tensors_loaded": 0}
    path = resolve_path(name, pretrained)
    if path is None:
        return load_torchvision(model, name, keep_head=keep_head)

    title = TITLES.get(name, "TwistNet")
    if pretrained == "auto":
        print(f"[Auto-detected] Found {title} weights: {path}", flush=True)
    file = read_weights(path)
    # A classifier that is kept belongs to the whole network, not to a part of it.
    accepted = (name,) if keep_head else (name, PARTIAL.get(name, name))
    if recognise(file.tensors, accepted) is None:
        raise misfit_error(path, file.tensors, name)
    if keep_head:
        check_head(model, path, file.tensors)
    loaded = load_fitting(model, file.tensors, keep_head=keep_head)

    print(f"[{title} Pretrained] Loaded {len(loaded)} layers from {path}", flush=True)
    print(f"[{title} Pretrained] {describe(file)}", flush=True)
    if file.ema:
        print(f"[{title} Pretrained] {file.ema}", flush=True)
    print_left_out(title, model, file.tensors, loaded)
    return {"source": str(path), "sha256": file.sha256, "tensors_loaded": len(loaded)}


def load_torchvision(model: nn.Module, name: str, *, keep_head: bool) -> dict:
    """Load torchvision's ResNet-18: whole, all but SE, or for TwistNet the early layers."""
    if keep_head and name != "resnet18":
        raise UserError(f"no weights for {name} with a classifier: give --pretrained PATH")
    looked = candidate_paths(name)
    file = fetch_resnet18(name, looked)
    if keep_head:
        check_head(model, file.path, file.tensors)
    if name in TITLES:
        loaded = load_resnet(model, TITLES[name], file.tensors, keep_head=keep_head)
    else:
        loaded = load_twistnet_stem(model, file.tensors, looked)
    print_left_out(TITLES.get(name, "TwistNet"), model, file.tensors, loaded)
    return {"source": SOURCE, "sha256": None, "tensors_loaded": len(loaded)}


def load_trained(path: str | Path) -> tuple[nn.Module, dict]:
    """Load a trained network with its classifier, in eval mode, from a checkpoint or weights file.

    The dict has: model, num_classes, classes (names, or None), record (the JSON beside the weights,
    or None), config (the training configuration of the checkpoint, or else of the JSON), path,
    sha256. Raises UserError for a file that contains none of the networks.
    """
    file = read_weights(Path(path))
    name = recognise(file.tensors, MODELS)
    if name is None:
        claimed = str((file.config or {}).get("model"))
        name = claimed if claimed in MODELS else "twistnet18"
        raise misfit_error(file.path, file.tensors, name)
    num_classes = count_classes(file)
    model = MODELS[name](num_classes)
    check_head(model, file.path, file.tensors)
    load_fitting(model, file.tensors, keep_head=True)
    if file.ema:
        print(file.ema, file=sys.stderr)

    # What is known about the training: the checkpoint's own configuration, or the JSON's recipe.
    record, _ = read_record(file)
    recipe = (record or {}).get("recipe")
    recorded = {**(record or {}), **(recipe if isinstance(recipe, dict) else {})}
    names = file.classes or (record or {}).get("class_names")
    return model.eval(), {
        "model": name,
        "num_classes": num_classes,
        "classes": names if isinstance(names, list) and len(names) == num_classes else None,
        "config": file.config or recorded,
        "record": record,
        "path": str(file.path),
        "sha256": file.sha256,
    }


def count_classes(file: WeightsFile) -> int:
    """The number of classes of a file's classifier; UserError where it has none."""
    weight = file.tensors.get(HEAD[0])
    if weight is None or weight.dim() != 2:
        raise UserError(f"{file.path} has no classifier (fc.weight), so its classes are unknown")
    return len(weight)


# ---------------------------------------------------------------- what is printed


def read_record(file: WeightsFile) -> tuple[dict | None, str]:
    """The JSON beside a weights file, or None and the reason why there is none for this file."""
    path = file.path.with_suffix(".json")
    if not path.exists():
        return None, f"no {path.name} beside it"
    record = read_json(path)
    if record is None:
        return None, f"{path.name} cannot be read"
    if record.get("sha256") != file.sha256:
        return None, f"{path.name} belongs to another file (its sha256 differs)"
    return record, ""


def describe(file: WeightsFile) -> str:
    """Classes, epochs and accuracy in a line: test weights must not be mistaken for real ones."""
    if file.config is not None:
        classes = "unknown" if file.classes is None else len(file.classes)
        return f"A training checkpoint: model {file.config.get('model')}, {classes} classes"
    record, problem = read_record(file)
    try:
        return (
            f"{record['classes']:d} classes, {record['epochs']:d} epochs, "
            f"top-1 {record['top1']:.2f} %, top-5 {record['top5']:.2f} %"
        )
    except (KeyError, TypeError, ValueError):
        problem = problem or f"{file.path.stem}.json cannot be read"
        return f"Classes, epochs and accuracy unknown: {problem}"


def print_left_out(
    title: str, model: nn.Module, tensors: dict[str, Tensor], loaded: list[str]
) -> None:
    """Name the tensors of the file that were not loaded, and those of the network that are new."""
    own = model.state_dict()
    unused = [name for name in tensors if name not in loaded]
    new = [n for n in own if n not in loaded and not n.endswith(".num_batches_tracked")]
    for text, names, among in (
        ("Left out of the file", unused, tensors),
        ("New in the network", new, own),
    ):
        if names:
            print(f"[{title} Pretrained] {text}: {', '.join(shorten(names, among))}", flush=True)
