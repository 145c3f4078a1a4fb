"""Where pretrained weights come from, and what is said about them."""

import hashlib
import json
import pickle
from collections.abc import Iterable
from http.client import HTTPException
from pathlib import Path

from torch import Tensor, nn
from torchvision.models import ResNet18_Weights

from common.errors import UserError
from models import MODELS
from models.weights_file import HEAD, WeightsFile, misfit, read_bytes, read_weights, recognise

SCRIPT_DIR = Path(__file__).resolve().parent.parent
TITLES = {"resnet18": "ResNet-18", "seresnet18": "SE-ResNet-18"}  # all others are TwistNet
# whose weights may fill a network in part
PARTIAL = {
    "seresnet18": "resnet18",
    "twistnet18_no_spiral": "twistnet18",
    "twistnet18_no_ais": "twistnet18",
    "twistnet18_first_order": "twistnet18",
}
EARLY_LAYERS = ("conv1.", "bn1.", "layer1.", "layer2.")  # what TwistNet shares with ResNet-18
TORCHVISION = ResNet18_Weights.IMAGENET1K_V1
TORCHVISION_SOURCE = f"torchvision {TORCHVISION}"


def candidates(name: str) -> list[Path]:
    """The files looked for, first choice first: own weights; TwistNet-18's for its ablations."""
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
    return next((path for path in candidates(name) if path.is_file()), None)


def weights_identity(name: str, pretrained: str = "auto") -> dict[str, str | None]:
    """What load_pretrained would load, {"source", "sha256"}, without building anything."""
    if pretrained == "none":
        return {"source": "none", "sha256": None}
    path = find_weights(name) if pretrained == "auto" else given(pretrained)
    if path is None:
        return {"source": TORCHVISION_SOURCE, "sha256": None}
    return {"source": str(path), "sha256": hashlib.sha256(read_bytes(path)).hexdigest()}


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
    path = find_weights(name) if pretrained == "auto" else given(pretrained)
    if path is None:
        return load_torchvision(model, name, keep_head=keep_head)
    title = TITLES.get(name, "TwistNet")
    if pretrained == "auto":
        print(f"[Auto-detected] Found {title} weights: {path}", flush=True)
    file = read_weights(path)
    # a head that is kept belongs to the whole network, not to a part of it
    allowed = (name,) if keep_head else (name, PARTIAL.get(name, name))
    if recognise(file.tensors, allowed) is None:
        raise misfit(file, name)
    if keep_head:
        check_head(model, path, file.tensors)
    loaded = fill(model, file.tensors, keep_head=keep_head)
    print(f"[{title} Pretrained] Loaded {len(loaded)} layers from {path}", flush=True)
    print(f"[{title} Pretrained] {described(file)}", flush=True)
    print_left_out(title, model, file.tensors, loaded)
    return {"source": str(path), "sha256": file.sha256, "tensors_loaded": len(loaded)}


def load_trained(path: str | Path) -> tuple[nn.Module, dict]:
    """A trained network with its classifier, in eval mode, from a checkpoint or weights file.

    The dict: model, num_classes, classes (names, or None), record (the JSON beside the weights, or
    None), config (what it was trained with, by the checkpoint or else by the JSON), path, sha256.
    """
    file = read_weights(Path(path))
    name = recognise(file.tensors, tuple(MODELS))
    if name is None:
        claimed = str((file.config or {}).get("model"))
        raise misfit(file, claimed if claimed in MODELS else "twistnet18")
    if file.tensors.get(HEAD[0]) is None or file.tensors[HEAD[0]].dim() != 2:
        raise UserError(f"{file.path} has no classifier (fc.weight): nothing to classify with")
    classes = len(file.tensors[HEAD[0]])
    model = MODELS[name](classes)
    check_head(model, file.path, file.tensors)
    fill(model, file.tensors, keep_head=True)
    record = read_record(file)
    record = record if isinstance(record, dict) else None
    recipe = (record or {}).get("recipe")
    recorded = {**(record or {}), **(recipe if isinstance(recipe, dict) else {})}
    names = file.classes or (record or {}).get("class_names")
    return model.eval(), {
        "model": name,
        "num_classes": classes,
        "classes": names if isinstance(names, list) and len(names) == classes else None,
        "config": file.config or recorded,
        "record": record,
        "path": str(file.path),
        "sha256": file.sha256,
    }


def load_torchvision(model: nn.Module, name: str, *, keep_head: bool) -> dict:
    """Load torchvision's ResNet-18: whole, all but SE, or for TwistNet the early layers."""
    tensors = fetch_torchvision(name)
    if keep_head:
        if name != "resnet18":
            raise UserError(f"no weights for {name} with a classifier: give --pretrained PATH")
        check_head(model, Path(TORCHVISION.url), tensors)
    if name in TITLES:
        loaded = load_resnet(model, name, tensors, keep_head=keep_head)
    else:
        loaded = load_twistnet_stem(model, name, tensors)
    print_left_out(TITLES.get(name, "TwistNet"), model, tensors, loaded)
    return {"source": TORCHVISION_SOURCE, "sha256": None, "tensors_loaded": len(loaded)}


def fetch_torchvision(name: str) -> dict[str, Tensor]:
    """torchvision's ResNet-18 weights, from torch.hub's cache or the network."""
    try:
        tensors = TORCHVISION.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (OSError, HTTPException, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        looked = " and ".join(map(str, candidates(name)))
        raise UserError(
            f"no weights for {name}: looked for {looked}, and {TORCHVISION_SOURCE} could not "
            f"be downloaded ({reason}); run pretrain_imagenet.py --model {name}, give "
            "--pretrained PATH, or train from scratch with --pretrained none"
        ) from None
    if recognise(tensors, ("resnet18",)) is None:
        file = Path(TORCHVISION.url).name
        raise UserError(f"torch.hub's {file} is no ResNet-18: delete it, and it is fetched again")
    return tensors


def load_resnet(
    model: nn.Module, name: str, tensors: dict[str, Tensor], *, keep_head: bool
) -> list[str]:
    """Load all that fits into ResNet-18 or SE-ResNet-18; the names of the tensors loaded."""
    title = TITLES[name]
    loaded = fill(model, tensors, keep_head=keep_head)
    print(f"[{title} Pretrained] Loaded {len(loaded)} layers from {TORCHVISION_SOURCE}", flush=True)
    scores = TORCHVISION.meta["_metrics"]["ImageNet-1K"]
    print(
        f"[{title} Pretrained] {len(TORCHVISION.meta['categories'])} classes, "
        f"top-1 {scores['acc@1']:.2f} %, top-5 {scores['acc@5']:.2f} % (torchvision's figures)",
        flush=True,
    )
    return loaded


def load_twistnet_stem(model: nn.Module, name: str, tensors: dict[str, Tensor]) -> list[str]:
    """Load the stem, layer1 and layer2 alone, and warn; the names of the tensors loaded."""
    early = {k: x for k, x in tensors.items() if k.startswith(EARLY_LAYERS)}
    loaded = fill(model, early, keep_head=False)
    parameters = {key: p.numel() for key, p in model.named_parameters()}
    count = sum(parameters.get(key, 0) for key in loaded)
    total = sum(parameters.values())
    print(
        f"[ResNet-18 Fallback] WARNING: no TwistNet weights "
        f"({', '.join(map(str, candidates(name)))}); "
        f"only stem, layer1 and layer2 come from {TORCHVISION_SOURCE}: {len(loaded)} tensors, "
        f"{count:,} of {total:,} parameters = {100 * count / total:.1f} %. This is not "
        "recommended: run pretrain_imagenet.py first.",
        flush=True,
    )
    return loaded


def fill(model: nn.Module, tensors: dict[str, Tensor], *, keep_head: bool) -> list[str]:
    """Load every tensor whose name and shape fit, the classifier's only with keep_head."""
    own = model.state_dict()
    fitting = {
        name: x
        for name, x in tensors.items()
        if name in own and x.shape == own[name].shape and (keep_head or name not in HEAD)
    }
    if not fitting:
        raise UserError("the weights have no tensor that fits the network: 0 layers loaded")
    model.load_state_dict(fitting, strict=False)
    return list(fitting)


def check_head(model: nn.Module, path: Path, tensors: dict[str, Tensor]) -> None:
    own = model.state_dict()
    for name in HEAD:
        have = tuple(tensors[name].shape) if name in tensors else "missing"
        want = tuple(own[name].shape) if name in own else "none"
        if have != want:
            raise UserError(f"{path}: {name} is {have}, the network's is {want}: other classes")


def given(pretrained: str) -> Path:
    path = Path(pretrained)
    if not path.is_file():
        raise UserError(f"--pretrained {pretrained}: no such file (or give auto, or none)")
    return path


def read_record(file: WeightsFile) -> dict | str:
    """The JSON beside a weights file, or what is wrong with it."""
    path = file.path.with_suffix(".json")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"no {path.name} beside it"
    except (OSError, ValueError):
        return f"{path.name} cannot be read"
    if not isinstance(record, dict):
        return f"{path.name} cannot be read"
    if record.get("sha256") != file.sha256:
        return f"{path.name} belongs to another file (its sha256 differs)"
    return record


def described(file: WeightsFile) -> str:
    """Classes, epochs and accuracy in one line: nobody shall fine-tune a toy for the real thing."""
    if file.config is not None:
        classes = "unknown" if file.classes is None else len(file.classes)
        return f"A training checkpoint: model {file.config.get('model')}, {classes} classes"
    record = read_record(file)
    if isinstance(record, dict):
        try:
            return (
                f"{record['classes']:d} classes, {record['epochs']:d} epochs, "
                f"top-1 {record['top1']:.2f} %, top-5 {record['top5']:.2f} %"
            )
        except (KeyError, TypeError, ValueError):
            record = f"{file.path.stem}.json cannot be read"
    return f"Classes, epochs and accuracy unknown: {record}"


def print_left_out(
    title: str, model: nn.Module, tensors: dict[str, Tensor], loaded: list[str]
) -> None:
    """Name what the file has and the network did not take, and what starts new in the network."""
    unused = [name for name in tensors if name not in loaded]
    new = [
        name
        for name in model.state_dict()
        if name not in loaded and not name.endswith(".num_batches_tracked")
    ]
    for text, names, among in (
        ("Left out of the file", unused, tensors),
        ("New in the network", new, model.state_dict()),
    ):
        if names:
            print(f"[{title} Pretrained] {text}: {', '.join(shortened(names, among))}", flush=True)


def shortened(names: list[str], among: Iterable[str]) -> list[str]:
    """The names, with a whole module of `among` written as one `module.*`."""
    kept = set(among) - set(names)
    short = {}
    for name in names:
        parts = name.split(".")
        stems = (".".join(parts[:i]) + "." for i in range(1, len(parts)))
        stem = next((s for s in stems if not any(k.startswith(s) for k in kept)), None)
        short[name if stem is None else stem + "*"] = None
    return list(short)
