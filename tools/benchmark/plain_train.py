"""The plain training script that tools.benchmark compares with: what most repositories copy.

  python -m tools.benchmark.plain_train --data_dir TREE --out plain --model resnet18

TREE contains train/ and val/, each with one folder per class. Workers read with ImageFolder,
augment each image with Pillow (RandAugment, arXiv:1909.13719), normalise it to float32 and mix the
batch in the collate function (MixUp, arXiv:1710.09412, or CutMix, arXiv:1905.04899). Training is in
float32, with torch.optim.SGD and a cosine schedule. Only the network comes from this project. The
accuracies, in percent, are written to OUT/results.json.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, default_collate
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

from models import build_model

NUMBERS = {"epochs": 3, "batch_size": 32, "img_size": 224, "workers": 4, "seed": 42, "lr": 0.1}
# The smallest share of a random crop, RandAugment's operations per image, and MixUp's alpha; with 0
# of the latter two there is no RandAugment, and neither MixUp nor CutMix.
NUMBERS |= {"min_scale": 0.08, "num_ops": 2, "mixup": 0.2}
TO_FLOAT = (
    transforms.ToTensor(),
    transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
)


def plain_values(recipe: dict) -> dict[str, float]:
    """A recipe's values of these three; for timm's RandAugment, which is a policy, NUMBERS'."""
    randaugment = recipe["randaugment"]
    num_ops = NUMBERS["num_ops"] if isinstance(randaugment, str) else randaugment[0]
    return {"min_scale": recipe["crop_scale"][0], "num_ops": num_ops, "mixup": recipe["mixup"]}


def make_train_transform(
    size: int, min_scale: float = NUMBERS["min_scale"], num_ops: int = NUMBERS["num_ops"]
) -> transforms.Compose:
    bicubic = InterpolationMode.BICUBIC
    crop = transforms.RandomResizedCrop(size, scale=(min_scale, 1.0), interpolation=bicubic)
    randaugment = [transforms.RandAugment(num_ops, 9)] if num_ops else []
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(), *randaugment, *TO_FLOAT])


def make_eval_transform(size: int) -> transforms.Compose:
    resize = transforms.Resize(round(size * 256 / 224), InterpolationMode.BICUBIC)
    return transforms.Compose([resize, transforms.CenterCrop(size), *TO_FLOAT])


class MixingCollate:
    """Collates a batch and applies either MixUp or CutMix to it."""

    def __init__(self, num_classes: int, mixup: float):
        choices = v2.MixUp(alpha=mixup, num_classes=num_classes), v2.CutMix(num_classes=num_classes)
        self.mix = v2.RandomChoice(choices)

    def __call__(self, samples: list) -> tuple[torch.Tensor, torch.Tensor]:
        return self.mix(*default_collate(samples))


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, device: str) -> float:
    """Top-1 accuracy in percent."""
    model.eval()
    correct = 0
    for images, labels in loader:
        correct += (model(images.to(device)).argmax(1) == labels.to(device)).sum().item()
    return 100 * correct / len(loader.dataset)


def main() -> None:
    parser = argparse.ArgumentParser(description="the plain recipe, for comparison")
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="resnet18")
    for name, default in NUMBERS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    # data
    train_transform = make_train_transform(args.img_size, args.min_scale, args.num_ops)
    train = ImageFolder(args.data_dir / "train", train_transform)
    val = ImageFolder(args.data_dir / "val", make_eval_transform(args.img_size))
    options = {"batch_size": args.batch_size, "num_workers": args.workers}
    options |= {"pin_memory": device == "cuda", "persistent_workers": args.workers > 0}
    collate = MixingCollate(len(train.classes), args.mixup) if args.mixup else None
    train_loader = DataLoader(train, shuffle=True, drop_last=True, collate_fn=collate, **options)
    val_loader = DataLoader(val, **options)

    # network, loss, optimizer and schedule
    model = build_model(args.model, len(train.classes)).to(device)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.lr, momentum=0.9, weight_decay=1e-4, nesterov=True
    )
    steps = args.epochs * len(train_loader)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    # training, with a validation and a checkpoint per epoch
    accuracies = []
    for epoch in range(args.epochs):
        model.train()
        for images, targets in train_loader:
            loss = criterion(model(images.to(device)), targets.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        accuracies.append(evaluate(model, val_loader, device))
        print(f"epoch {epoch + 1}: validation accuracy {accuracies[-1]:.2f} %", flush=True)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, args.out / "latest.pt")
    results = {"val_acc": max(accuracies), "last_val_acc": accuracies[-1]}
    (args.out / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
