"""Evaluate a weights file or a run's checkpoint, and compare with the accuracy recorded for it.

  python -m tools.evaluate --weights weights/twistnet18_imagenet.pt --data_dir /path/to/imagenet
  python -m tools.evaluate --weights runs/dtd_fold1_twistnet18_seed42/best.pt --split val

The first counts top-1 and top-5 on val/ and compares with the JSON beside the weights, which must
contain the file's sha256. The second evaluates on the run's own dataset and fold, or on those
given, and compares with its results.json. Flags that are not given are as in training, so that the
counts are equal. Every image is counted: one that cannot be read ends the evaluation.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from common.cli import Parser, add_amp_flags, add_crop_flag, add_weights_flag, at_least, run
from common.errors import UserError
from common.files import read_json
from data.imagenet import Source, list_tree, load_imagenet
from data.images import EvalSet, spot_check
from data.loading import EvalLoader
from data.splits import fingerprint
from data.textures import DATASETS, load_splits
from data.transforms import EvalTransform, make_eval_transform
from models.weights import load_trained
from training.distributed import DistributedContext
from training.engine import PRECISIONS, EvalMetrics, Evaluator, choose_precision
from training.results import is_percentage


class FlipAverage(nn.Module):
    """Averages a network's logits over each image and its mirror image."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return (self.model(images) + self.model(images.flip(-1))) / 2


def parse_args(argv: list[str] | None):
    parser = Parser(prog="python -m tools.evaluate", description=__doc__)
    add_weights_flag(parser)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data_dir", type=Path, metavar="DIR", help="folder of the data (default: the run's)"
    )
    data.add_argument(
        "--dataset",
        choices=["imagenet", *DATASETS],
        metavar="NAME",
        help="imagenet (val/ of any tree of class folders), "
        f"{', '.join(DATASETS)} (default: the run's, else imagenet)",
    )
    data.add_argument(
        "--fold", type=at_least(1), metavar="K", help="fold of the dataset (default: the run's)"
    )
    data.add_argument(
        "--num_folds",
        type=at_least(1),
        metavar="N",
        help="number of folds of --dataset folder (default: the run's, else 10)",
    )
    data.add_argument(
        "--split",
        choices=["test", "val"],
        help="split to evaluate (default: test; imagenet has only val)",
    )
    data.add_argument(
        "--workers",
        type=at_least(0),
        default=4,
        metavar="N",
        help="loader processes, at most one per CPU",
    )
    how = parser.add_argument_group("how")
    add_crop_flag(how)
    how.add_argument(
        "--resize",
        type=at_least(32),
        metavar="PX",
        help="shorter side before the crop (default: as in training, else 256/224 of it)",
    )
    how.add_argument(
        "--flip", action="store_true", help="average the logits of each image and its mirror image"
    )
    how.add_argument(
        "--batch_size",
        type=at_least(1),
        metavar="B",
        help="images per batch (default: as in training, else 256)",
    )
    add_amp_flags(how)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)

    # the network and the data, which must have the same classes
    model, about = load_trained(args.weights, img_size=args.img_size)
    check_sha256(args.weights, about["sha256"])
    config = about["config"]
    fill_defaults_from_run(args, config)
    source, classes = load_data(args, config)
    check_classes(about, classes, args.data_dir)
    transform = make_eval_transform(config, args.img_size)
    transform.resize = args.resize or transform.resize
    if transform.resize < args.img_size:
        raise UserError(f"--resize {args.resize} is smaller than the crop of {args.img_size}")

    # what is evaluated, and how
    print(
        f"{about['model']}, {about['num_classes']} classes, from {args.weights}"
        + (", sha256 as its JSON says" if about["record"] else "")
    )
    part = args.split if args.dataset == "imagenet" else f"fold {args.fold}, {args.split}"
    print(
        f"{len(source):,} images of {args.dataset}, {part}, in {args.data_dir}; resize "
        f"{transform.resize}, crop {args.img_size}, {args.precision}"
        + (", with mirror images" if args.flip else "")
    )

    # accuracies, beside the recorded ones
    metrics = count_correct(
        FlipAverage(model) if args.flip else model,
        source,
        transform,
        batch_size=args.batch_size,
        workers=args.workers,
        device=args.device,
        precision=args.precision,
    )
    counts = {"top-1": metrics.top1, "top-5": metrics.top5}
    images = metrics.num_images
    for name, count in counts.items():
        print(f"{name} {100 * count / images:.2f} % ({count:,} of {images:,})")
    path, recorded, recorded_images = find_recorded(args, about)
    if not recorded:
        print("nothing is recorded for these images beside the file")
    for name, percent in recorded.items():
        comparison = compare(percent, counts[name], images, recorded_images)
        print(f"{path}: {name} {percent:.2f} %{comparison}")


def check_sha256(path: Path, found: str) -> None:
    """Raise UserError if the JSON beside the weights belongs to another file."""
    beside = path.with_suffix(".json")
    expected = (read_json(beside) or {}).get("sha256")
    if expected not in (None, found):
        raise UserError(
            f"{path} has sha256 {found}, {beside} says {expected}: the weights were changed or "
            "damaged, or the two files do not belong together; get both again, or move the JSON "
            "away"
        )


def fill_defaults_from_run(args, config: dict) -> None:
    """Fill in the flags that were not given: as in the network's training, else with defaults.

    config: what the checkpoint or the weights' JSON records of the training.
    """
    # data: where and what the run had, unless another dataset is given
    on_run = "dataset" in config and args.dataset in (None, config["dataset"])
    args.dataset = args.dataset or config.get("dataset", "imagenet")
    if args.dataset == "imagenet":
        if args.split == "test" or args.fold or args.num_folds:
            raise UserError(
                "--dataset imagenet has neither folds nor a test split: its val/ is evaluated"
            )
        args.split = "val"
    args.split = args.split or "test"
    if on_run:
        args.data_dir = args.data_dir or config.get("data_dir")
        args.fold = args.fold or config.get("fold")
    if args.data_dir is None:
        raise UserError("--data_dir is required: the folder of the images")
    args.data_dir = Path(args.data_dir)
    if args.dataset != "imagenet" and args.fold is None:
        raise UserError(f"--fold is required: the fold of {args.dataset}")
    args.num_folds = args.num_folds or config.get("num_folds", 10)

    # size, batches and precision; train.py evaluates in batches of at least 32
    args.img_size = args.img_size or config.get("img_size", 224)
    args.batch_size = args.batch_size or max(config.get("batch_size", 256), 32 if on_run else 1)
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.precision = choose_precision(args.device, args.amp)
    if args.amp is None and config.get("precision") in PRECISIONS:
        args.precision = config["precision"]


def load_data(args, config: dict) -> tuple[Source, list[str]]:
    """The images to evaluate on, and their classes; warns if they are not the run's."""
    if args.dataset == "imagenet":
        if (args.data_dir / "val").is_dir():  # train/ need not exist
            return list_tree(args.data_dir / "val")
        _, source, classes = load_imagenet(args.data_dir)  # packed, or an error
        return source, classes

    splits = load_splits(args.dataset, args.data_dir, args.fold, num_folds=args.num_folds)
    if config.get("dataset") == args.dataset:
        if config.get("fold") != args.fold:
            print(
                f"warning: trained on fold {config.get('fold')}: images of fold {args.fold} "
                "may be among those it was trained on"
            )
        elif config.get("data") not in (None, fingerprint(splits)):
            print(f"warning: fold {args.fold} in {args.data_dir} has other images than the run had")
    return getattr(splits, args.split), splits.classes


def check_classes(about: dict, classes: list[str], data_dir: Path) -> None:
    """Raise UserError unless the network's classes are the data's, in the same order."""
    own = about["classes"]
    if own is None and about["num_classes"] == len(classes):
        print("the file does not name its classes: assumed to be the data's, in the same order")
    elif own is None or len(own) != len(classes):
        raise UserError(
            f"{about['path']} has {about['num_classes']} classes, the data in "
            f"{data_dir} {len(classes)}"
        )
    elif own != classes:
        i = next(i for i, name in enumerate(own) if name != classes[i])
        same_names = sorted(own) == sorted(classes)
        order = "the same classes in another order" if same_names else "other classes"
        raise UserError(
            f"the data in {data_dir} has {order} than {about['path']}: number {i} is "
            f"{classes[i]}, the network's is {own[i]}"
        )


def count_correct(
    model: nn.Module,
    source: Source,
    transform: EvalTransform,
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    precision: str,
) -> EvalMetrics:
    """Evaluate on every image once, with the code of training's validation."""
    spot_check(source)
    model.to(device, memory_format=torch.channels_last)
    loader = EvalLoader(EvalSet(source, transform), batch_size=batch_size, workers=workers)
    metrics = Evaluator(loader, DistributedContext(device=device), precision).run(model)
    if metrics.unreadable:
        raise UserError(
            f"{len(metrics.unreadable)} images cannot be read, and an evaluation needs them all: "
            f"restore them: {', '.join(metrics.unreadable[:5])}"
            + (", …" if len(metrics.unreadable) > 5 else "")
        )
    return metrics


def find_recorded(args, about: dict) -> tuple[Path, dict[str, float], int | None]:
    """The file with the accuracies recorded for these images, these in percent, and of how many.

    {} and None where nothing is recorded; older files do not record the number.
    """
    config = about["config"]
    if about["record"] and args.dataset == "imagenet":
        found = {"top-1": about["record"].get("top1"), "top-5": about["record"].get("top5")}
        images = about["record"].get("val_images")
        path = args.weights.with_suffix(".json")
    else:
        path = args.weights.with_name("results.json")
        same = (args.dataset, args.fold) == (config.get("dataset"), config.get("fold"))
        results = (read_json(path) if same and args.weights.name == "best.pt" else None) or {}
        found = {"top-1": results.get(f"{args.split}_acc")}
        images = results.get(f"{args.split}_images")
    found = {name: value for name, value in found.items() if is_percentage(value)}
    return path, found, images


def compare(percent: float, count: int, images: int, recorded_images: int | None) -> str:
    """How a recorded percentage, of `recorded_images` if known, compares with this `count`."""
    before = percent * images / 100
    gap = f", now {100 * count / images - percent:+.2f} percentage points"
    if recorded_images not in (None, images) or abs(before - round(before)) > 1e-3:
        return f" of another number of images{gap}"
    more = count - round(before)
    if more == 0:
        return f" ({round(before):,}): the same count"
    return f" ({round(before):,}): {abs(more):,} {'more' if more > 0 else 'fewer'}{gap}"


if __name__ == "__main__":
    run(main)
