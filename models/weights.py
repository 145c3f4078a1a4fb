"""Find pretrained weights, load them, and print what was loaded."""

import sys
from pathlib import Path

from torch import Tensor, nn

from common.errors import UserError
from common.files import ROOT, read_json, sha256
from models import MODELS, build_model
from models.fitting import (
    check_head,
    compare_tensors,
    head_of,
    load_fitting,
    misfit_error,
    recognise,
    shorten,
)
from models.timm_models import (
    check_size,
    check_takes_images,
    fetch_published,
    fit_to_size,
    is_timm,
    published_source,
)
from models.torchvision_weights import SOURCE, fetch_resnet18, load_early_layers, load_resnet
from models.weights_file import WeightsFile, read_bytes, read_weights

# Our networks that torchvision's weights fill, and their titles; the others of ours are TwistNets,
# of which these weights fill the early layers.
TITLES = {"resnet18": "ResNet-18", "seresnet18": "SE-ResNet-18"}
# Networks that may be filled in part, and with whose weights.
PARTIAL = {
    "seresnet18": "resnet18",
    "twistnet18_no_spiral": "twistnet18",
    "twistnet18_no_ais": "twistnet18",
    "twistnet18_first_order": "twistnet18",
}


# ---------------------------------------------------------------- finding


def weights_stem(name: str) -> str:
    """The name of a network's weights file without its .pt: timm/x is timm-x_imagenet."""
    return f"{name.replace('/', '-')}_imagenet"


def title_of(name: str) -> str:
    """What the printed lines call a network."""
    return name if is_timm(name) else TITLES.get(name, "TwistNet")


def candidate_paths(name: str) -> list[Path]:
    """The files that "auto" looks for, in order; an ablation also takes TwistNet-18's."""
    names = [name]
    if PARTIAL.get(name) == "twistnet18":
        names.append("twistnet18")
    return [
        folder / f"{weights_stem(each)}.pt"
        for each in names
        for folder in (Path("weights"), ROOT / "weights")
    ]


def find_weights(name: str) -> Path | None:
    """The weights file that "auto" uses for a network, or None for those of torchvision or timm."""
    return next((path for path in candidate_paths(name) if path.is_file()), None)


def resolve_path(name: str, pretrained: str) -> Path | None:
    """The file that "auto" or a path stands for; None for torchvision's or timm's weights.

    Raises UserError where the path is not a file.
    """
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
        return {"source": published_source(name) if is_timm(name) else SOURCE, "sha256": None}
    return {"source": str(path), "sha256": sha256(read_bytes(path))}


# ---------------------------------------------------------------- loading


def load_pretrained(
    model: nn.Module,
    name: str,
    pretrained: str | Path = "auto",
    *,
    keep_head: bool = False,
    img_size: int | None = None,
) -> dict:
    """Load pretrained weights into the network `name`, print what was loaded, and return it.

    Args:
        model: the network, as build_model(name, num_classes) returns it.
        pretrained: "auto" searches weights/ here and beside the scripts, then takes torchvision's
            ResNet-18 weights, or those that timm publishes for its network; "none" loads nothing;
            anything else is the path of a file.
        keep_head: also load the classifier, for evaluation; fine-tuning starts a new one.
        img_size: what build_model was given; weights of timm's networks are fitted to it.

    Returns {"source", "sha256", "tensors_loaded"}, and of a file also "pretraining": its epochs and
    recipe, if it says so. sha256 is None without a file.
    Raises UserError for a file that is missing, damaged, or does not fit the network.
    """
    pretrained = str(pretrained)
    if pretrained == "none":
        return {"source": "none", "sha256": None, "tensors_loaded": 0}
    path = resolve_path(name, pretrained)
    if path is None and is_timm(name):
        return load_published(model, name, img_size, keep_head=keep_head)
    if path is None:
        return load_torchvision(model, name, keep_head=keep_head)

    title, head = title_of(name), head_of(name)
    if pretrained == "auto":
        print(f"[Auto-detected] Found {title} weights: {path}")
    file = read_weights(path)
    tensors = check_tensors(model, name, file, keep_head=keep_head, img_size=img_size)
    if keep_head:
        check_head(model, path, tensors, head)
    loaded = load_fitting(model, tensors, keep_head=keep_head, head=head)

    print(f"[{title} Pretrained] Loaded {len(loaded)} layers from {path}")
    print(f"[{title} Pretrained] {describe(file)}")
    if file.ema:
        print(f"[{title} Pretrained] {file.ema}")
    print_left_out(title, model, tensors, loaded)
    return {
        "source": str(path),
        "sha256": file.sha256,
        "tensors_loaded": len(loaded),
        "pretraining": describe_pretraining(file),
    }


def check_tensors(
    model: nn.Module,
    name: str,
    file: WeightsFile,
    *,
    keep_head: bool = False,
    img_size: int | None = None,
) -> dict[str, Tensor]:
    """The tensors of a file for the network `name`; UserError if they are not its own."""
    if not is_timm(name):
        # A classifier that is kept belongs to the whole network, not to a part of it.
        accepted = (name,) if keep_head else (name, PARTIAL.get(name, name))
        if recognise(file.tensors, accepted) is None:
            raise misfit_error(file.path, file.tensors, name)
        return file.tensors

    # The shapes of timm's networks can depend on the image size: compare with the network itself.
    wanted = {key: x.shape for key, x in model.state_dict().items()}
    if not any(compare_tensors(file.tensors, wanted, head_of(name))):
        return file.tensors
    fitted = fit_to_size(name, file.tensors, img_size)
    if fitted is None:
        raise misfit_error(file.path, file.tensors, name, wanted)
    return fitted


def load_published(model: nn.Module, name: str, img_size: int | None, *, keep_head: bool) -> dict:
    """Load the weights that timm publishes for its network."""
    source, title, head = published_source(name), title_of(name), head_of(name)
    tensors = fetch_published(name, img_size)
    if keep_head:
        check_head(model, Path(source), tensors, head)
    loaded = load_fitting(model, tensors, keep_head=keep_head, head=head)
    print(f"[{title} Pretrained] Loaded {len(loaded)} layers from {source}")
    print_left_out(title, model, tensors, loaded)
    return {"source": source, "sha256": None, "tensors_loaded": len(loaded)}


def load_torchvision(model: nn.Module, name: str, *, keep_head: bool) -> dict:
    """Load torchvision's ResNet-18: whole, all but SE, or for TwistNet the early layers."""
    if keep_head and name != "resnet18":
        raise UserError(f"no weights for {name} with a classifier: give num_classes, or a path")
    looked = candidate_paths(name)
    file = fetch_resnet18(name, looked)
    if keep_head:
        check_head(model, file.path, file.tensors)
    if name in TITLES:
        loaded = load_resnet(model, TITLES[name], file.tensors, keep_head=keep_head)
    else:
        loaded = load_early_layers(model, file.tensors, looked)
    print_left_out(title_of(name), model, file.tensors, loaded)
    return {"source": SOURCE, "sha256": None, "tensors_loaded": len(loaded)}


# What our own checkpoints hold; of other people's, a value of another type is ignored.
_CONFIG_TYPES = {
    **dict.fromkeys(("model", "dataset", "data_dir", "precision"), str),
    **dict.fromkeys(("fold", "num_folds", "img_size", "batch_size", "test_resize"), int),
}


def load_trained(path: str | Path, *, img_size: int | None = None) -> tuple[nn.Module, dict]:
    """Load a trained network with its classifier, in eval mode, from a checkpoint or weights file.

    The dict has: model, num_classes, classes (names, or None), record (the JSON beside the weights,
    or None), config (the training configuration of the checkpoint, or else of the JSON), path,
    sha256. Raises UserError for a file that contains none of the networks, and for an `img_size`
    that the network does not take.
    """
    file = read_weights(Path(path))
    # What is known about the training: the checkpoint's own configuration, or the JSON's recipe.
    record, _ = read_record(file)
    recipe = (record or {}).get("recipe")
    recorded = {**(record or {}), **(recipe if isinstance(recipe, dict) else {})}
    config = file.config or recorded
    config = {k: v for k, v in config.items() if isinstance(v, _CONFIG_TYPES.get(k, object))}

    # The network: one of ours by its tensors, one of timm's by the name that is recorded.
    claimed, built_for = str(config.get("model")), None
    if is_timm(claimed):
        name, built_for = claimed, config.get("img_size", 224)
        check_size(name, built_for, img_size or built_for)
    else:
        name = recognise(file.tensors, MODELS)
    if name is None:
        if claimed in MODELS:
            raise misfit_error(file.path, file.tensors, claimed)
        error = misfit_error(file.path, file.tensors, "twistnet18")
        raise UserError(f"{error}; a network of timm needs its .json beside it")
    num_classes = count_classes(file, name)
    model = build_model(name, num_classes, img_size=built_for)
    if built_for and img_size and img_size != built_for:
        check_takes_images(model, name, img_size)
    tensors = check_tensors(model, name, file, keep_head=True, img_size=built_for)
    check_head(model, file.path, tensors, head_of(name))
    load_fitting(model, tensors, keep_head=True, head=head_of(name))
    if file.ema:
        print(file.ema, file=sys.stderr)

    names = file.classes or (record or {}).get("class_names")
    if not isinstance(names, list) or len(names) != num_classes:
        names = None
    return model.eval(), {
        "model": name,
        "num_classes": num_classes,
        "classes": names if names is None else [str(name) for name in names],
        "config": config,
        "record": record,
        "path": str(file.path),
        "sha256": file.sha256,
    }


def count_classes(file: WeightsFile, name: str) -> int:
    """The number of classes of a file's classifier; UserError where it has none."""
    key = head_of(name)[0]
    weight = file.tensors.get(key)
    if weight is None or weight.dim() < 2:
        raise UserError(f"{file.path} has no classifier ({key}), so its classes are unknown")
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


def describe_pretraining(file: WeightsFile) -> str | None:
    """Such as "600 epochs of recipe guide"; None where no JSON beside the file says so."""
    record = read_record(file)[0] or {}
    recipe = record.get("recipe")
    name = recipe.get("recipe") if isinstance(recipe, dict) else None
    return f"{record['epochs']} epochs of recipe {name}" if name and "epochs" in record else None


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
            print(f"[{title} Pretrained] {text}: {', '.join(shorten(names, among))}")
