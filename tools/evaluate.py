"""Test a weights file or a run's checkpoint, and compare with what was recorded of it.

  python -m tools.evaluate --weights weights/twistnet18_imagenet.pt --data_dir /path/to/imagenet
  python -m tools.evaluate --weights runs/dtd_fold1_twistnet18_seed42/best.pt --split val

The first counts top-1 and top-5 on val/, and compares with the JSON beside the weights, whose
sha256 must be the file's. The second tests on the run's own dataset and fold, or on those given,
and compares with its results.json. All that is not given is as in training, so that the counts are
the same. An image that cannot be read is never left out: it ends the evaluation.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from common.cli import Parser, add_amp_flags, at_least, run
from common.errors import UserError
from common.files import read_json
from data.imagenet import Source, list_tree, load_imagenet
from data.images import EvalSet, spot_check
from data.loading import EvalLoader
from data.splits import fingerprint
from data.textures import DATASETS, load_splits
from data.transforms import trained_transform
from models.weights import load_trained
from training.distributed import DistributedContext
from training.engine import PRECISIONS, EvalMetrics, choose_precision, evaluate


class FlipAverage(nn.Module):
    """The mean of a network's logits for an image and its mirror image."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return (self.model(images) + self.model(images.flip(-1))) / 2


def parse_args(argv: list[str] | None):
    parser = Parser(prog="python -m tools.evaluate", description=__doc__)
    parser.add_argument(
        "--weights",
        type=Path,
        required=True,
        metavar="FILE",
        help="weights file, or best.pt of a run",
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data_dir",
        type=Path,
        metavar="DIR",
        help="where the data lies (default: where a run had it)",
    )
    data.add_argument(
        "--dataset",
        choices=["imagenet", *DATASETS],
        metavar="NAME",
        help="imagenet (val/ of any tree of class folders), "
        f"{', '.join(DATASETS)} (default: the run's, else imagenet)",
    )
    data.add_argument("--fold", type=at_least(1), metavar="K", help="(default: the run's)")
    data.add_argument(
        "--num_folds",
        type=at_least(1),
        metavar="N",
        help="of --dataset folder (default: the run's, else 10)",
    )
    data.add_argument(
        "--split", choices=["test", "val"], help="(default: test; imagenet has val alone)"
    )
    data.add_argument(
        "--workers",
        type=at_least(0),
        default=4,
        metavar="N",
        help="loader processes, at most the CPUs there are",
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--img_size",
        type=at_least(32),
        metavar="PX",
        help="crop (default: as in training, else 224)",
    )
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
        help="images at a time (default: as in training, else 256)",
    )
    add_amp_flags(how)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    model, about = load_trained(args.weights)
    check_sha256(args.weights, about["sha256"])
    trained = about["config"]
    settle(args, trained)
    source, classes, seen = load_data(args, trained)
    check_classes(about, classes, args.data_dir)
    transform = trained_transform(trained, args.img_size)
    transform.resize = args.resize or transform.resize
    if transform.resize < args.img_size:
        raise UserError(f"--resize {args.resize} is smaller than the crop of {args.img_size}")

    print(
        f"{about['model']}, {about['num_classes']} classes, from {args.weights}"
        + (", sha256 as its JSON says" if about["record"] else "")
    )
    print(
        f"{len(source):,} images of {args.dataset}, {seen}, in {args.data_dir}; resize "
        f"{transform.resize}, crop {args.img_size}, {args.precision}"
        + (", with mirror images" if args.flip else ""),
        flush=True,
    )
    score = test(FlipAverage(model) if args.flip else model, source, transform, args)
    ours = {"top-1": score.top1, "top-5": score.top5}
    for name, count in ours.items():
        print(f"{name} {100 * count / score.num_images:.2f} % ({count:,} of {score.num_images:,})")
    place, percents = recorded(args, about, trained)
    if not percents:
        print("nothing is recorded of these images beside the file")
    for name, percent in percents.items():
        print(f"{place}: {name} {percent:.2f} %" + verdict(percent, ours[name], score.num_images))


def check_sha256(path: Path, found: str) -> None:
    """UserError where the JSON beside the weights is another file's."""
    beside = path.with_suffix(".json")
    wanted = (read_json(beside) or {}).get("sha256")
    if wanted not in (None, found):
        raise UserError(
            f"{path} has sha256 {found}, {beside} says {wanted}: the weights were "
            "changed or damaged, or the two do not belong together; get both again, "
            "or move the JSON away"
        )


def settle(args, trained: dict) -> None:
    """Fill in what was not given with what the network was trained with, else with defaults."""
    on_run = "dataset" in trained and args.dataset in (None, trained["dataset"])
    args.dataset = args.dataset or trained.get("dataset", "imagenet")
    if args.dataset == "imagenet":
        if args.split == "test" or args.fold or args.num_folds:
            raise UserError(
                "--dataset imagenet has neither folds nor a test split: its val/ is scored"
            )
        args.split = "val"
    args.split = args.split or "test"
    args.data_dir = args.data_dir or (Path(trained["data_dir"]) if on_run else None)
    args.fold = args.fold or (trained["fold"] if on_run else None)
    if args.data_dir is None:
        raise UserError("--data_dir: say where the images lie")
    if args.dataset != "imagenet" and args.fold is None:
        raise UserError(f"--fold: say which fold of {args.dataset}")
    args.num_folds = args.num_folds or trained.get("num_folds", 10)
    args.img_size = args.img_size or trained.get("img_size", 224)
    # train.py never scores fewer than 32 at a time
    args.batch_size = args.batch_size or max(trained.get("batch_size", 256), 32 if on_run else 1)
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.precision = choose_precision(args.device, args.amp)
    if args.amp is None and trained.get("precision") in PRECISIONS:
        args.precision = trained["precision"]


def load_data(args, trained: dict) -> tuple[Source, list[str], str]:
    """The images to score, their classes, and what they are in words."""
    if args.dataset == "imagenet":
        if (args.data_dir / "val").is_dir():  # train/ need not be there
            source, classes = list_tree(args.data_dir / "val")
        else:  # packed, or nothing
            _, source, classes = load_imagenet(args.data_dir)
        return source, classes, "val"
    splits = load_splits(args.dataset, args.data_dir, args.fold, num_folds=args.num_folds)
    if trained.get("dataset") == args.dataset:
        if trained.get("fold") != args.fold:
            print(
                f"warning: trained on fold {trained.get('fold')}: images of fold {args.fold} "
                "may be among those it was trained on"
            )
        elif trained.get("data") not in (None, fingerprint(splits)):
            print(f"warning: fold {args.fold} in {args.data_dir} has other images than the run had")
    return getattr(splits, args.split), splits.classes, f"fold {args.fold}, {args.split}"


def check_classes(about: dict, classes: list[str], data_dir: Path) -> None:
    """UserError unless the network's classes are the data's, in the same order."""
    own = about["classes"]
    if own is None and about["num_classes"] == len(classes):
        print("the file does not name its classes: taken to be the data's, in the same order")
    elif own is None or len(own) != len(classes):
        raise UserError(
            f"{about['path']} has {about['num_classes']} classes, the data in "
            f"{data_dir} {len(classes)}"
        )
    elif own != classes:
        i = next(i for i, name in enumerate(own) if name != classes[i])
        order = (
            "the same classes in another order"
            if sorted(own) == sorted(classes)
            else ("other classes")
        )
        raise UserError(
            f"the data in {data_dir} has {order} than {about['path']}: number {i} is "
            f"{classes[i]}, the network's is {own[i]}"
        )


def test(model: nn.Module, source: Source, transform, args) -> EvalMetrics:
    """Score every image once, by the code that validates in training."""
    spot_check(source)
    model.to(args.device, memory_format=torch.channels_last)
    loader = EvalLoader(
        EvalSet(source, transform),
        batch_size=args.batch_size,
        workers=args.workers,
        pin_memory=args.device.type == "cuda",
    )
    context = DistributedContext(device=args.device)
    score = evaluate(model, loader, context=context, precision=args.precision)
    if score.unreadable:
        raise UserError(
            f"{len(score.unreadable)} images cannot be read, and are never left out: "
            f"restore them: {', '.join(score.unreadable[:5])}"
            + (", …" if len(score.unreadable) > 5 else "")
        )
    return score


def recorded(args, about: dict, trained: dict) -> tuple[Path, dict[str, float]]:
    """The file that says what came out before, and its percentages; none if nothing is recorded."""
    if about["record"] and args.dataset == "imagenet":
        found = {"top-1": about["record"].get("top1"), "top-5": about["record"].get("top5")}
        path = args.weights.with_suffix(".json")
    else:
        path = args.weights.with_name("results.json")
        same = (args.dataset, args.fold) == (trained.get("dataset"), trained.get("fold"))
        results = read_json(path) if same and args.weights.name == "best.pt" else None
        found = {"top-1": (results or {}).get(f"{args.split}_acc")}
    return path, {name: value for name, value in found.items() if isinstance(value, float | int)}


def verdict(percent: float, count: int, images: int) -> str:
    """How a recorded percentage compares with a count."""
    before = percent * images / 100
    gap = f", now {100 * count / images - percent:+.2f} percentage points"
    if abs(before - round(before)) > 1e-3:
        return f" of another number of images{gap}"
    more = count - round(before)
    if more == 0:
        return f" ({round(before):,}): the same count"
    return f" ({round(before):,}): {abs(more):,} {'more' if more > 0 else 'fewer'}{gap}"


if __name__ == "__main__":
    run(main)
