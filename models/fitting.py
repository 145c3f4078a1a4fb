"""Compare tensors by name with the networks, and load what fits."""

from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from common.errors import UserError
from models import MODELS
from models.timm_models import classifier_tensors, is_timm

HEAD = ("fc.weight", "fc.bias")  # the classifier of our networks
SHOWN = 4  # names in an error before "..."


def head_of(name: str) -> tuple[str, ...]:
    """The names of the classifier's tensors, which a comparison leaves out."""
    return classifier_tensors(name) if is_timm(name) else HEAD


def tensor_shapes(name: str) -> dict[str, torch.Size]:
    """The names and shapes of a network's tensors, without allocating them."""
    with torch.device("meta"):
        return {key: x.shape for key, x in MODELS[name](1).state_dict().items()}


def compare_tensors(
    tensors: dict[str, Tensor], wanted: dict[str, torch.Size], head: Collection[str] = HEAD
) -> tuple[list[str], list[str], list[str]]:
    """The names that are missing, unexpected, and of another shape, without the classifier's."""
    missing = [
        # Older files, torchvision's ResNet-18 among them, have no counter of BatchNorm's batches.
        name
        for name in wanted
        if name not in tensors and not name.endswith(".num_batches_tracked")
    ]
    unexpected = [name for name in tensors if name not in wanted]
    misshapen = [name for name, x in tensors.items() if x.shape != wanted.get(name, x.shape)]
    return tuple([n for n in names if n not in head] for names in (missing, unexpected, misshapen))


def recognise(tensors: dict[str, Tensor], names: Iterable[str]) -> str | None:
    """The first of the networks that has exactly these tensors, apart from the classifier."""
    for name in names:
        if not any(compare_tensors(tensors, tensor_shapes(name))):
            return name
    return None


def misfit_error(
    path: Path, tensors: dict[str, Tensor], name: str, wanted: dict[str, torch.Size] | None = None
) -> UserError:
    """The error that says which tensors of a file do not fit the network `name`.

    wanted: the network's own names and shapes, where they depend on more than its name.
    """
    wanted = wanted or tensor_shapes(name)
    missing, unexpected, misshapen = compare_tensors(tensors, wanted, head_of(name))
    misshapen = [f"{n} {tuple(tensors[n].shape)} not {tuple(wanted[n])}" for n in misshapen]
    problems = [
        f"{len(found)} {word} ({first_few(found)})"
        for word, found in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("misshapen", misshapen),
        )
        if found
    ]
    actual = recognise(tensors, MODELS)
    hint = f"; it contains {actual}" if actual else ""
    if misshapen and not (missing or unexpected) and is_timm(name):
        hint = "; was it trained at another --img_size?"
    return UserError(f"{path} does not fit {name}: {', '.join(problems)}{hint}")


def load_fitting(
    model: nn.Module, tensors: dict[str, Tensor], *, keep_head: bool, head: Collection[str] = HEAD
) -> list[str]:
    """Load every tensor whose name and shape fit, and return their names.

    The classifier is loaded with keep_head alone, even where its shape fits.
    """
    own = model.state_dict()
    fitting = {
        name: x
        for name, x in tensors.items()
        if name in own and x.shape == own[name].shape and (keep_head or name not in head)
    }
    if not fitting:
        raise UserError("the weights have no tensor that fits the network: 0 layers loaded")
    model.load_state_dict(fitting, strict=False)
    return list(fitting)


def check_head(
    model: nn.Module, path: Path, tensors: dict[str, Tensor], head: Collection[str] = HEAD
) -> None:
    """Raise UserError unless the file's classifier has the shape of the network's."""
    own = model.state_dict()
    for name in head:
        have = tuple(tensors[name].shape) if name in tensors else "missing"
        want = tuple(own[name].shape) if name in own else "absent"
        if have != want:
            raise UserError(
                f"{path}: {name} is {have} and the network's is {want}: the number of classes "
                "differs"
            )


def first_few(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def shorten(names: list[str], among: Iterable[str]) -> list[str]:
    """The names, with every module of `among` that is listed completely as one `module.*`."""
    others = set(among) - set(names)
    short = {}  # a dict, because it keeps the order
    for name in names:
        parts = name.split(".")
        modules = (".".join(parts[:i]) + "." for i in range(1, len(parts)))
        whole = next((m for m in modules if not any(n.startswith(m) for n in others)), None)
        short[name if whole is None else whole + "*"] = None
    return list(short)
