"""What a step of training costs: time and memory of ours, and of the plain recipe's."""

import multiprocessing
import resource
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch.nn import functional as F

from data.images import Sample
from models import build_model
from tools.benchmark.timing import interleaved
from training.distributed import init_distributed
from training.engine import Trainer, choose_precision
from training.optim import make_sgd


def make_step(name: str, *, plain: bool, batch_size: int, img_size: int) -> Callable[[int], None]:
    """One step of training (forward, backward, optimizer) on a batch that lies on the device."""
    world = init_distributed()
    torch.manual_seed(0)
    model = build_model(name, 1000).to(world.device)
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
    trainer = Trainer(
        model,
        make_sgd(model, lr=0.1, weight_decay=1e-4),
        world,
        choose_precision(world.device, True),
        lambda image, label, draws, step, micro: (image, targets),
    )
    sample = Sample(
        batch.contiguous(memory_format=torch.channels_last),
        labels,
        labels,
        torch.empty(0),
        torch.zeros_like(labels),
    )
    return lambda number: trainer.step([sample], step=number, lr=0.1)


STEPS = {
    "plain ResNet-18, fp32, NCHW": ("resnet18", True),
    "ours, resnet18": ("resnet18", False),
    "ours, twistnet18": ("twistnet18", False),
}


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
    return {
        "step": table,
        "threads": torch.get_num_threads(),
        **shape,
        "twistnet_time": median(
            a / b for a, b in zip(twistnet["walls"], resnet["walls"], strict=True)
        ),
        "twistnet_memory": twistnet["peak_mb"] / resnet["peak_mb"],
    }
