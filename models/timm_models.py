"""Any image classifier of timm as a baseline, under the name timm/NAME (pip install timm).

timm's networks get what timm gives them: its own drop rates, classifier, image size
where the network has a fixed one, and the mean and standard deviation of its pretrained weights.
Source: PyTorch Image Models (Wightman 2019, github.com/huggingface/pytorch-image-models).
"""

import difflib
import logging
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.optional import import_optional

PREFIX = "timm/"
# What timm's networks raise where a setting or an image size does not suit them.
BUILD_ERRORS = (AssertionError, RuntimeError, TypeError, ValueError)


def is_timm(name: str) -> bool:
    return name.startswith(PREFIX)


def import_timm(name: str) -> ModuleType:
    return import_optional("timm", purpose=f"--model {name}")


def find_config(name: str):
    """timm's pretrained_cfg of a network: size, statistics, classifier and published weights.

    Raises UserError unless `name` is timm/ and a classifier of timm, with or without its tag.
    """
    timm = import_timm(name)
    own = name.removeprefix(PREFIX)
    if timm.is_model(own):
        try:
            config = timm.get_pretrained_cfg(own)
        except RuntimeError:  # a tag that the network does not have
            config = None
        if config is not None and config.classifier:
            return config
        if config is not None:
            raise no_classifier_error(name)
    known = timm.list_models() + (timm.list_pretrained() if "." in own else [])
    close = [PREFIX + each for each in difflib.get_close_matches(own, known, n=3)]
    advice = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() lists them"
    raise UserError(f"--model {name}: timm {timm.__version__} has no such network; {advice}")


def no_classifier_error(name: str) -> UserError:
    return UserError(f"--model {name}: this network of timm has no classifier to train")


# ---------------------------------------------------------------- building


def build_timm(
    name: str, num_classes: int, *, img_size: int | None, stochastic_depth: float
) -> nn.Module:
    """Build a network of timm with random weights, for images as data.transforms.normalise makes.

    Args:
        img_size: side of the images in pixels; None takes timm's. Only networks whose size is
            fixed, such as Swin, are built for it; all others take any.
        stochastic_depth: largest drop rate of a residual branch; 0 keeps the network's own.

    Raises UserError for networks that timm does not have, or that do not take such images.
    """
    config = find_config(name)
    settings = {}
    if config.fixed_input_size and img_size:
        settings["img_size"] = img_size
    if stochastic_depth:
        settings["drop_path_rate"] = stochastic_depth
    try:
        model = import_timm(name).create_model(
            name.removeprefix(PREFIX), num_classes=num_classes, **settings
        )
        change_statistics(model, config.mean, config.std)
    except BUILD_ERRORS as error:
        asked = f"{img_size} px" if img_size else "its own image size"
        if stochastic_depth:
            asked += f" and stochastic depth {stochastic_depth:g}"
        raise UserError(f"{name} cannot be built for {asked}: {_shorten(error)}") from error
    if num_classes and not model.state_dict().keys() >= set(classifier_tensors(name)):
        raise no_classifier_error(name)  # timm names one that was never built
    if img_size:
        check_takes_images(model, name, img_size)
    return model


def check_takes_images(model: nn.Module, name: str, img_size: int) -> None:
    """Classify one black image; UserError where the network does not take images of this size.

    Some take only what their patches divide, or what they can halve often enough.
    """
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, img_size, img_size))
    except BUILD_ERRORS as error:
        raise UserError(f"{name} does not take {img_size} px images: {_shorten(error)}") from error
    model.train()


def _shorten(error: Exception) -> str:
    """An error of timm or torch in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def change_statistics(model: nn.Module, mean: tuple, std: tuple) -> None:
    """Let a network that expects other statistics than ImageNet's take images that have these.

    All images are normalised with ImageNet's mean and standard deviation, and many of timm's
    weights were trained with 0.5. x * scale + shift is what they expect. The two are not in the
    state dict, which stays timm's own.
    """
    constants = import_optional("timm.data", purpose="--model timm/NAME")
    imagenet_mean = torch.tensor(constants.IMAGENET_DEFAULT_MEAN)
    imagenet_std = torch.tensor(constants.IMAGENET_DEFAULT_STD)
    mean, std = torch.tensor(mean), torch.tensor(std)
    if torch.equal(mean, imagenet_mean) and torch.equal(std, imagenet_std):
        return
    scale, shift = imagenet_std / std, (imagenet_mean - mean) / std
    model.register_buffer("input_scale", scale.view(3, 1, 1), persistent=False)
    model.register_buffer("input_shift", shift.view(3, 1, 1), persistent=False)
    model.register_forward_pre_hook(_rescale)


def _rescale(model: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0] * model.input_scale + model.input_shift,)


def check_size(name: str, built_for: int, img_size: int) -> None:
    """Raise UserError if images of `img_size` px do not fit a network built for another size."""
    if img_size != built_for and find_config(name).fixed_input_size:
        raise UserError(
            f"--img_size {img_size}: {name} was trained at {built_for} px and takes no other "
            "size; leave the flag out"
        )


# ---------------------------------------------------------------- weights


def classifier_tensors(name: str) -> tuple[str, ...]:
    """The names of a network's classifiers' tensors: two, or four where it has a second one."""
    modules = find_config(name).classifier
    modules = (modules,) if isinstance(modules, str) else modules
    return tuple(f"{module}.{part}" for module in modules for part in ("weight", "bias"))


def published_source(name: str) -> str:
    """What timm publishes for a network, as "timm convnext_tiny.in12k_ft_in1k".

    Raises UserError where it publishes nothing.
    """
    config = find_config(name)
    if not config.has_weights:
        raise UserError(
            f"timm has no pretrained weights for {name}: give --pretrained PATH, or train from "
            "scratch with --pretrained none"
        )
    return f"timm {config.architecture}.{config.tag}"


def fetch_published(name: str, img_size: int | None) -> dict[str, Tensor]:
    """The published weights of a network at an image size; timm downloads them or has them cached.

    Raises UserError where they cannot be downloaded.
    """
    source = published_source(name)
    print(f"[{name} Pretrained] Loading {source}")
    try:
        with quiet_downloads():
            return create_tensors(name, img_size, pretrained=True)
    except Exception as error:  # the hub's client has many errors of its own
        sentence = " ".join(str(error).split()).partition(". ")[0]
        reason = f"{type(error).__name__}: {sentence}"[:160]
        raise UserError(
            f"no weights for {name}: {source} could not be loaded ({reason}); give --pretrained "
            "PATH, or train from scratch with --pretrained none"
        ) from None


@contextmanager
def quiet_downloads():
    """Without the hub's warning for each of its attempts: one line says it all."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def fit_to_size(
    name: str, tensors: dict[str, Tensor], img_size: int | None
) -> dict[str, Tensor] | None:
    """The tensors for another image size than they were trained at, None if they do not fit.

    timm interpolates position embeddings and tables of relative positions. For some networks, such
    as inception_v3, it would also accept tensors of which few or none belong to them.
    """
    head = tensors.get(classifier_tensors(name)[0])
    if head is None:  # timm would accept any tensors at all
        return None
    overlay = {"state_dict": dict(tensors), "num_classes": len(head), "label_offset": 0}
    try:
        start = create_tensors(name, img_size, num_classes=len(head))
        filled = create_tensors(
            name,
            img_size,
            num_classes=len(head),
            pretrained=True,
            pretrained_cfg_overlay=overlay,
        )
    except Exception:  # timm's converters fail in many ways on foreign tensors
        return None
    # Both drew the same random weights, so that what is still equal was not filled.
    absent = [key for key, x in filled.items() if key not in tensors and x.is_floating_point()]
    return None if any(torch.equal(filled[key], start[key]) for key in absent) else filled


def create_tensors(name: str, img_size: int | None, **settings) -> dict[str, Tensor]:
    """The state dict of a network of timm, which leaves no trace in the random numbers."""
    if find_config(name).fixed_input_size and img_size:
        settings["img_size"] = img_size
    timm = import_timm(name)
    own = name.removeprefix(PREFIX)
    with torch.random.fork_rng(devices=[]):
        return timm.create_model(own, **settings).state_dict()
