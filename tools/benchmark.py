"""Measure the data path and the training step against the plain recipe, side by side in one run.

  python -m tools.benchmark loader --data_dir /path/to/imagenet   CPU time an image of the workers
  python -m tools.benchmark step                                  one training step, and its memory
  python -m tools.benchmark joint --cores 32 --gpus 4 --step_rate 3000   which of the two decides

Rows take turns, so that whatever else the machine does falls on all of them, and medians are shown.
CPU time is this process's; start it with OMP_NUM_THREADS=1 for figures a core. Without --data_dir
images are drawn. --step_rate is images/s of one GPU with all the data it wants.
"""

import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import default_collate
from torchvision import transforms as v1

from data import DataError, images
from data.imagenet import list_tree, load_imagenet
from data.images import ImageFiles, Sample, TrainSet, collate
from data.packed import ABOUT, PackedImages, Packing, read_about
from data.synthetic import write_imagenet_tree
from data.transforms import IMAGENET_MEAN, IMAGENET_STD, Augment, TrainTransform
from models import ModelError, build_model
from training import RunError
from training.command_line import Parser, at_least, run
from training.distributed import start_processes, usable_cpus
from training.engine import Trainer, choose_precision
from training.optim import make_sgd

ROOT = Path(__file__).resolve().parent.parent
IMAGENET_TRAIN = 1_281_167
DRAWN_SIZE = 420  # px, about ImageNet's mean


def parse_args(argv: list[str] | None = None):
    parser = Parser(prog="python -m tools.benchmark", description=__doc__)
    parser.add_argument("what", choices=("loader", "step", "joint"), help="loader, step or joint")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--rounds", type=at_least(1), default=5, metavar="N",
                        help="turns of each row; the medians are shown")
    parser.add_argument("--img_size", type=at_least(32), default=224, metavar="PX", help="crop")
    parser.add_argument("--batch_size", type=at_least(2), default=32, metavar="B",
                        help="images a batch")
    loader = parser.add_argument_group("loader and joint")
    loader.add_argument("--data_dir", type=Path, metavar="DIR",
                        help="a tree with train/, or a folder of class folders")
    loader.add_argument("--images", type=at_least(2), default=128, metavar="N",
                        help="how many of its images are read")
    joint = parser.add_argument_group("joint")
    joint.add_argument("--cores", type=at_least(1), default=usable_cpus(), metavar="C",
                       help="cores that load")
    joint.add_argument("--gpus", type=at_least(1), default=max(1, torch.cuda.device_count()),
                       metavar="G", help="GPUs that train")
    joint.add_argument("--step_rate", type=at_least(0.001, float), metavar="R",
                       help="images/s of a GPU's steps (default: TwistNet-18's here, measured)")
    joint.add_argument("--epochs", type=at_least(1), default=600, metavar="N",
                       help="of ImageNet's 1,281,167 images")
    return parser.parse_args(argv)


# ------------------------------------------------------------------ timing


def interleaved(rows: dict[str, Callable[[int], None]], *, rounds: int, images: int) -> list[dict]:
    """Run each row in turn, `rounds` times after a first one that does not count.

    Returns, for each, medians of CPU and wall milliseconds an image, the first row's CPU and wall
    time divided by its own, as the median over the rounds, and each turn's wall time in seconds.
    """
    measured = {name: [] for name in rows}
    for turn in range(rounds + 1):
        for name, row in rows.items():
            cpu, wall = time.process_time(), time.perf_counter()
            row(turn)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            spent = time.process_time() - cpu, time.perf_counter() - wall
            if turn:
                measured[name].append(spent)
    first = next(iter(measured.values()))
    table = []
    for name, turns in measured.items():
        ratios = [[a / b for a, b in zip(mine, theirs, strict=True)]
                  for mine, theirs in zip(first, turns, strict=True)]
        table.append({
            "row": name, "walls": [turn[1] for turn in turns],
            **{f"{clock}_ms": 1e3 / images * median(turn[i] for turn in turns)
               for i, clock in enumerate(("cpu", "wall"))},
            **{f"{clock}_ratio": median(ratio[i] for ratio in ratios)
               for i, clock in enumerate(("cpu", "wall"))}})
    return table


def print_table(title: str, table: list[dict]) -> None:
    print(f"\n{title}\n{'':32}{'CPU ms':>9}{'wall ms':>9}{'images/s':>10}{'CPU ×':>8}{'wall ×':>8}")
    for row in table:
        print(f"{row['row']:32}{row['cpu_ms']:9.3f}{row['wall_ms']:9.3f}"
              f"{1e3 / row['wall_ms']:10.1f}{row['cpu_ratio']:8.2f}{row['wall_ratio']:8.2f}")


# ------------------------------------------------------------------ loader


class PlainSet:
    """What everyone copies: Pillow, float transforms, RandAugment and normalisation, all here."""

    def __init__(self, source: ImageFiles, size: int):
        self.source = source
        self.transform = v1.Compose([
            v1.RandomResizedCrop(size, interpolation=v1.InterpolationMode.BICUBIC),
            v1.RandomHorizontalFlip(), v1.RandAugment(), v1.ToTensor(),
            v1.Normalize(IMAGENET_MEAN, IMAGENET_STD)])

    def __getitem__(self, key: tuple[int, int]):
        with open(self.source.path(key[1]), "rb") as file:
            image = Image.open(file).convert("RGB")
        return self.transform(image), int(self.source.labels[key[1]])


@contextmanager
def pillow_alone():
    """Decode as where torchcodec is not installed."""
    fast, images.fast_jpeg = images.fast_jpeg, lambda: None
    try:
        yield
    finally:
        images.fast_jpeg = fast


def small_tree(args, folder: Path) -> Path:
    """A tree of links to some of --data_dir's images, or of drawn ones."""
    tree = folder / "tree"
    if args.data_dir is None:
        write_imagenet_tree(tree, train_per_class=-(-args.images // 8), val_per_class=1,
                            size=DRAWN_SIZE, seed=0)
        return tree
    if (args.data_dir / ABOUT).exists():
        raise RunError(f"--data_dir {args.data_dir} is packed: give the tree, it is packed here")
    inside = args.data_dir / "train"
    source, _ = list_tree(inside if inside.is_dir() else args.data_dir)
    chosen = np.linspace(0, len(source) - 1, min(args.images, len(source))).astype(int)
    for number, index in enumerate(chosen.tolist()):
        path = source.path(index).resolve()
        for split in ("train", "val"):
            place = tree / split / f"{source.labels[index]:05d}"
            place.mkdir(parents=True, exist_ok=True)
            if split == "train" or not any(place.iterdir()):
                (place / f"{number}{path.suffix}").symlink_to(path)
    return tree


def pack(tree: Path, out: Path) -> PackedImages:
    done = subprocess.run([sys.executable, "-m", "tools.pack", "--data_dir", tree, "--out", out,
                           "--skip_unreadable"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"tools.pack failed: {done.stderr.strip()}")
    return load_imagenet(out)[0]


def decode_all(source: ImageFiles, out: Path) -> PackedImages:
    out.mkdir()
    packing = Packing(out, {})
    writer = packing.writer("decoded", source.files, source.labels)
    for index in range(len(source)):
        image = source.read(index).permute(1, 2, 0).contiguous()
        writer.add(index, image.numpy(), *image.shape[:2], decoded=True)
    packing.finish([])
    return PackedImages(out, "decoded", read_about(out)["splits"]["decoded"])


def loader(args) -> dict:
    """CPU time an image of a worker: read, decode, augment, collate; and the device's part."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        tree = small_tree(args, folder)
        files, _, _ = load_imagenet(tree)
        packed = pack(tree, folder / "packed")
        pixels = decode_all(files, folder / "decoded")

        def epoch(dataset, collate_fn):
            def turn(number: int) -> None:
                for first in range(0, len(dataset.source), args.batch_size):
                    batch = range(first, min(first + args.batch_size, len(dataset.source)))
                    keys = [(number, index) for index in batch]
                    if hasattr(dataset, "__getitems__"):  # as DataLoader asks
                        collate_fn(dataset.__getitems__(keys))
                    else:
                        collate_fn([dataset[key] for key in keys])
            return turn

        def ours(source, *, pillow: bool):
            turn = epoch(TrainSet(source, TrainTransform(args.img_size), 0), collate)

            def with_pillow(number: int) -> None:
                with pillow_alone():
                    turn(number)
            return with_pillow if pillow else turn

        rows = {"plain: PIL, float, RandAugment": epoch(PlainSet(files, args.img_size),
                                                        default_collate)}
        for what, source in (("files", files), ("packed 256", packed)):
            rows[f"{what}, Pillow"] = ours(source, pillow=True)
            if images.fast_jpeg():
                rows[f"{what}, torchcodec"] = ours(source, pillow=False)
        rows["decoded once (fine-tuning)"] = ours(pixels, pillow=True)
        table = interleaved(rows, rounds=args.rounds, images=len(files))
        train_set = TrainSet(files, TrainTransform(args.img_size), 0)
        few = collate([train_set[0, i % len(files)] for i in range(args.batch_size)])
        kb = {what: size / len(files) / 1e3 for what, size in (
            ("files", sum(files.path(i).stat().st_size for i in range(len(files)))),
            ("packed", packed.data.numel()), ("decoded", pixels.data.numel()))}
    return {"loader": table, "device": device_part(args, few), "images": len(files), "kb": kb}


def device_part(args, batch: Sample) -> list[dict]:
    """RandAugment, normalisation and mixing of whole batches, where the network trains."""
    device = start_processes().device
    augment = Augment(1000, seed=0, magnitude=9, mixup=0.2, cutmix=1.0)
    image, label = batch.image.to(device), batch.label.to(device)

    def turn(number: int) -> None:
        for micro in range(4):
            draws = batch.draws.roll(4 * number + micro, 0)  # the ops fall on other images
            augment(image, label, draws, step=number, micro=micro)
    return interleaved({f"ours, on {device.type}": turn}, rounds=args.rounds,
                       images=4 * len(label))


# ------------------------------------------------------------------ step


def make_step(name: str, *, plain: bool, batch_size: int, img_size: int) -> Callable[[int], None]:
    """One step of training (forward, backward, optimizer) on a batch that lies on the device."""
    world = start_processes()
    torch.manual_seed(0)
    model = build_model(name, 1000, "none").to(world.device)
    batch = torch.randn(batch_size, 3, img_size, img_size, device=world.device)
    labels = torch.randint(1000, (batch_size,), device=world.device)
    targets = F.one_hot(labels, 1000).float()
    if plain:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)

        def turn(number: int) -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(batch), targets, label_smoothing=0.1).backward()
            optimizer.step()
        return turn
    model.to(memory_format=torch.channels_last)
    trainer = Trainer(model, make_sgd(model, lr=0.1, weight_decay=1e-4), world,
                      choose_precision(world.device, True),
                      lambda image, label, draws, step, micro: (image, targets))
    sample = Sample(batch.contiguous(memory_format=torch.channels_last), labels, labels,
                    torch.empty(0), torch.zeros_like(labels))
    return lambda number: trainer.step([sample], step=number, lr=0.1)


STEPS = {"plain ResNet-18, fp32, NCHW": ("resnet18", True), "ours, resnet18": ("resnet18", False),
         "ours, twistnet18": ("twistnet18", False)}


def peak_rss() -> int:
    """Bytes of this process at most; Linux's, as getrusage's counts in the parent's at the fork."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes


def peak_memory(name: str, plain: bool, batch_size: int, img_size: int, send) -> None:
    """Bytes at most used by three steps; on a CPU more than the process had before."""
    before = peak_rss()
    turn = make_step(name, plain=plain, batch_size=batch_size, img_size=img_size)
    for number in range(3):
        turn(number)
    if torch.cuda.is_available():
        send.send(torch.cuda.max_memory_allocated())
    else:
        send.send(peak_rss() - before)


def step(args) -> dict:
    shape = {"batch_size": args.batch_size, "img_size": args.img_size}
    turns = {row: make_step(name, plain=plain, **shape) for row, (name, plain) in STEPS.items()}
    table = interleaved(turns, rounds=args.rounds, images=args.batch_size)
    spawn = multiprocessing.get_context("spawn")
    for row, (name, plain) in zip(table, STEPS.values(), strict=True):
        receive, send = spawn.Pipe(duplex=False)
        child = spawn.Process(target=peak_memory, args=(name, plain, *shape.values(), send))
        child.start()
        send.close()
        row["peak_mb"] = receive.recv() / 1e6
        child.join()
    *_, resnet, twistnet = table
    return {"step": table, "threads": torch.get_num_threads(), **shape,
            "twistnet_time": median(a / b for a, b in zip(
                twistnet["walls"], resnet["walls"], strict=True)),
            "twistnet_memory": twistnet["peak_mb"] / resnet["peak_mb"]}


# ------------------------------------------------------------------ both


def joint(args) -> dict:
    found = loader(args)
    rate = args.step_rate
    if rate is None:
        turn = make_step("twistnet18", plain=False, batch_size=args.batch_size,
                         img_size=args.img_size)
        rate = 1e3 / interleaved({"": turn}, rounds=args.rounds,
                                 images=args.batch_size)[0]["wall_ms"]
    machine = []
    for row in found["loader"]:
        loads, trains = args.cores * 1e3 / row["cpu_ms"], args.gpus * rate
        reached = min(loads, trains)
        machine.append({
            "row": row["row"], "loads": loads, "trains": trains, "reached": reached,
            "bottleneck": "loader" if loads < trains else "step",
            "days": args.epochs * IMAGENET_TRAIN / reached / 86400})
    return {**found, "joint": machine, "cores": args.cores, "gpus": args.gpus,
            "step_rate": rate, "epochs": args.epochs}


def show(found: dict) -> None:
    if "loader" in found:
        sizes = ", ".join(f"{what} {size:.0f} KB" for what, size in found["kb"].items())
        print_table(f"loader, an image, of {found['images']} images ({sizes} each)",
                    found["loader"])
        print_table("what the device does to it, in batches", found["device"])
    if "step" in found:
        print_table(f"step, an image, batch {found['batch_size']}, {found['img_size']} px, "
                    f"{found['threads']} threads", found["step"])
        for row in found["step"]:
            print(f"peak memory, {row['row']}: {row['peak_mb']:,.0f} MB")
        print(f"twistnet18 / resnet18: time {found['twistnet_time']:.3f}, memory "
              f"{found['twistnet_memory']:.3f}")
    if "joint" in found:
        print(f"\n{found['cores']} cores, {found['gpus']} GPUs at {found['step_rate']:.0f} images/s"
              f", {found['epochs']} epochs of ImageNet")
        for row in found["joint"]:
            print(f"{row['row']:32} loads {row['loads']:8.0f}, trains {row['trains']:8.0f} "
                  f"images/s: the {row['bottleneck']} decides, {row['reached']:.0f} images/s, "
                  f"{row['days']:.1f} days")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise RunError("the benchmark is one process: start it with python, not torchrun")
    found = {"loader": loader, "step": step, "joint": joint}[args.what](args)
    print(json.dumps(found, indent=1)) if args.json else show(found)


if __name__ == "__main__":
    run(main, DataError, ModelError)
