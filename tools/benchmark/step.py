"""The time and memory of one training step: the plain recipe's, and ours with each STCI path."""

import multiprocessing
import resource
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.nn import functional as F

from data.images import Sample, collate
from data.transforms import make_augmentation
from models import build_model
from models.stci import STCI
from tools.benchmark.timing import interleaved
from training.distributed import init_distributed
from training.engine import Trainer, choose_precision
from training.optim import make_optimizer
from training.recipes import PRETRAIN

NUM_CLASSES = 1000
# label: (network, how it is trained); the second row is what the TwistNets are compared with
ROWS = {
    "plain recipe, ResNet-18, fp32": ("resnet18", "plain recipe"),
    "ours, ResNet-18": ("resnet18", "auto"),
    "ours, TwistNet-18, plain STCI": ("twistnet18", "plain"),
    "ours, TwistNet-18, fused STCI": ("twistnet18", "fused"),
    "ours, TwistNet-18, compiled": ("twistnet18", "compiled"),
}


def steps_per_turn() -> int:
    """Enough steps for a GPU not to wait for the host at each end of a turn."""
    return 10 if torch.cuda.is_available() else 1


def make_turn(
    name: str, how: str, *, batch_size: int, img_size: int, recipe: str = "guide"
) -> Callable[[int], None]:
    """Some training steps on one batch, which starts in the host's memory.

    how: "plain recipe" as in plain_train.py; or Trainer.step, with an STCI.implementation ("auto",
    "plain", "fused"), or "compiled" by torch.compile. On a GPU ours includes what the workers leave
    to it: the copy of uint8 images, and the recipe's RandAugment, normalisation and mixing.
    """
    context = init_distributed()
    torch.manual_seed(0)
    model = build_model(name, NUM_CLASSES).to(context.device)
    if how == "plain recipe":
        return make_plain_turn(model, context.device, batch_size=batch_size, img_size=img_size)

    # the network
    model.to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, STCI) and how in ("plain", "fused"):
            module.implementation = how
    if how == "compiled":
        model.compile()

    # the batch; on a CPU augmentation is part of loading, and here the network's own part counts
    on_gpu = context.device.type == "cuda"
    batch, augment = make_batch(batch_size, img_size, recipe=recipe, pin_memory=on_gpu)
    if not on_gpu:
        images, targets = augment(batch.image, batch.label, batch.draws, step=0, micro=0)

        def augment(*args, **kwargs):
            return images, targets

    optimizer = make_optimizer(PRETRAIN[recipe], model, lr=0.1)
    precision = choose_precision(context.device, True)
    trainer = Trainer(model, optimizer, context, precision, augment)

    def turn(number: int) -> None:
        for step in range(steps_per_turn()):
            trainer.step([batch], step=number * steps_per_turn() + step, lr=0.1)

    return turn


def make_batch(
    batch_size: int, img_size: int, *, recipe: str, pin_memory: bool
) -> tuple[Sample, Callable]:
    """A collated batch of random images, and the device's part of its augmentation."""
    transform, augment = make_augmentation(
        {**PRETRAIN[recipe], "train_sizes": None}, size=img_size, seed=0, num_classes=NUM_CLASSES
    )
    samples = []
    for index in range(batch_size):
        image = torch.randint(256, (3, img_size, img_size), dtype=torch.uint8)
        image, draws = transform(image)
        samples.append(Sample(image, index % NUM_CLASSES, index, draws, 0))
    batch = collate(samples)
    return (Sample(*(x.pin_memory() for x in batch)) if pin_memory else batch), augment


def make_plain_turn(
    model: nn.Module, device: torch.device, *, batch_size: int, img_size: int
) -> Callable[[int], None]:
    """The training steps of plain_train.py on one batch, which its workers have mixed."""
    images = torch.randn(batch_size, 3, img_size, img_size)
    targets = F.one_hot(torch.randint(NUM_CLASSES, (batch_size,)), NUM_CLASSES).float()
    if device.type == "cuda":
        images, targets = images.pin_memory(), targets.pin_memory()
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True
    )

    def turn(number: int) -> None:
        model.train()
        for _ in range(steps_per_turn()):
            loss = criterion(model(images.to(device)), targets.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return turn


def measure_step(args) -> dict:
    """Time and peak memory of each row, and each TwistNet's ratios to ResNet-18."""
    shape = {"batch_size": args.batch_size, "img_size": args.img_size}

    # time, in this process; a machine without a compiler has no row of the compiled network
    turns, left_out = {}, {}
    for row, (name, how) in ROWS.items():
        turns[row] = make_turn(name, how, **shape)
        if how == "compiled" and (reason := why_it_fails(turns[row])):
            del turns[row]
            left_out[row] = reason
    images = args.batch_size * steps_per_turn()
    table = interleaved(turns, rounds=args.rounds, images=images)

    # memory, each in a process of its own; the compiler's own memory would hide the network's
    turns.clear()
    torch.cuda.empty_cache()
    for row in table:
        name, how = ROWS[row["row"]]
        if how != "compiled" or torch.cuda.is_available():
            peak = measure_peak_memory(name, how, **shape)
            if peak is not None:
                row["peak_mb"] = peak / 1e6

    # ratios
    _, reference, *twistnets = table
    for row in twistnets:
        ratios = [a / b for a, b in zip(row["walls"], reference["walls"], strict=True)]
        row["time_vs_resnet"] = median(ratios)
        if "peak_mb" in row and "peak_mb" in reference:
            row["memory_vs_resnet"] = row["peak_mb"] / reference["peak_mb"]
    return {"step": table, "threads": torch.get_num_threads(), "left_out": left_out, **shape}


def why_it_fails(turn: Callable[[int], None]) -> str | None:
    """The first line of the error of a turn, or None; for what not every machine can run."""
    try:
        turn(0)
    except Exception as error:  # torch.compile raises what its many back ends raise
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def measure_peak_memory(name: str, how: str, *, batch_size: int, img_size: int) -> int | None:
    """Bytes that training steps need at most, in a process of their own; None if that fails."""
    spawn = multiprocessing.get_context("spawn")
    receive, send = spawn.Pipe(duplex=False)
    child = spawn.Process(target=send_peak_memory, args=(name, how, batch_size, img_size, send))
    child.start()
    send.close()
    try:
        peak = receive.recv()
    except EOFError:  # the child has printed why
        peak = None
    child.join()
    return peak


def send_peak_memory(name: str, how: str, batch_size: int, img_size: int, send) -> None:
    """Run three turns; send the GPU's peak, or on a CPU how much this process grew."""
    before = read_peak_rss()
    turn = make_turn(name, how, batch_size=batch_size, img_size=img_size)
    for number in range(3):
        turn(number)
    if torch.cuda.is_available():
        send.send(torch.cuda.max_memory_allocated())
    else:
        send.send(read_peak_rss() - before)


def read_peak_rss() -> int:
    """Peak RSS in bytes, from VmHWM on Linux: ru_maxrss includes the parent's peak at the fork."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes
