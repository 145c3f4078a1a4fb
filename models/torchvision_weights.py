"""torchvision's ImageNet weights of ResNet-18, for networks without weights of their own."""

from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights

from common.errors import UserError
from common.files import sha256
from models.fitting import load_fitting
from models.weights_file import WeightsFile, read_bytes, read_weights

WEIGHTS = ResNet18_Weights.IMAGENET1K_V1
SOURCE = f"torchvision {WEIGHTS}"
URL = WEIGHTS.url  # .../resnet18-f37072fd.pth: the name has the start of the file's sha256
EARLY_LAYERS = ("conv1.", "bn1.", "layer1.", "layer2.")  # what TwistNet shares with ResNet-18


def fetch_resnet18(name: str, looked: list[Path]) -> WeightsFile:
    """Read the weights from torch.hub's cache; download them if they are not in it.

    torch.hub checks a file's hash when it downloads it, not when it finds it in the cache. Here it
    is always checked, because the accuracy that is printed is that of the published file.

    Args:
        name: the network that the weights are for, for messages alone.
        looked: where weights of its own were searched, likewise.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", Path(URL).name)
    hash_prefix = path.stem.rpartition("-")[2]
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(path), hash_prefix)
        except (OSError, HTTPException, RuntimeError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            raise UserError(
                f"no weights for {name}: looked for {' and '.join(map(str, looked))}, and {SOURCE} "
                f"could not be downloaded ({reason}); run pretrain_imagenet.py --model {name}, "
                "give --pretrained PATH, or train from scratch with --pretrained none"
            ) from None
    found = sha256(read_bytes(path))
    if not found.startswith(hash_prefix):
        raise UserError(
            f"{path} is damaged or is not the file that torchvision published (its sha256 starts "
            f"with {found[: len(hash_prefix)]}): delete it, and it will be downloaded again"
        )
    return read_weights(path)


def load_resnet(
    model: nn.Module, title: str, tensors: dict[str, Tensor], *, keep_head: bool
) -> list[str]:
    """Load all that fits into ResNet-18 or SE-ResNet-18; return the names of these tensors."""
    loaded = load_fitting(model, tensors, keep_head=keep_head)
    print(f"[{title} Pretrained] Loaded {len(loaded)} layers from {SOURCE}")
    scores = WEIGHTS.meta["_metrics"]["ImageNet-1K"]
    print(
        f"[{title} Pretrained] {len(WEIGHTS.meta['categories'])} classes, top-1 "
        f"{scores['acc@1']:.2f} %, top-5 {scores['acc@5']:.2f} % (torchvision's figures)"
    )
    return loaded


def load_early_layers(
    model: nn.Module, tensors: dict[str, Tensor], looked: list[Path]
) -> list[str]:
    """Load only the stem, layer1 and layer2, and warn; return the names of these tensors."""
    early = {name: x for name, x in tensors.items() if name.startswith(EARLY_LAYERS)}
    loaded = load_fitting(model, early, keep_head=False)
    parameters = {name: p.numel() for name, p in model.named_parameters()}
    count = sum(parameters.get(name, 0) for name in loaded)
    total = sum(parameters.values())
    print(
        f"[ResNet-18 Fallback] WARNING: no TwistNet weights ({', '.join(map(str, looked))}); only "
        f"stem, layer1 and layer2 come from {SOURCE}: {len(loaded)} tensors, {count:,} of "
        f"{total:,} parameters = {100 * count / total:.1f} %. This is not recommended: run "
        "pretrain_imagenet.py first."
    )
    return loaded
