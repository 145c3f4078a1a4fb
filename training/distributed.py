"""The processes of a run: one without torchrun, any number under it, on CPUs or GPUs."""

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """This process among those of the run. Every collective here is a no-op when alone.

    Collectives take and give plain numbers, and go through the CPU's gloo group: they order the
    ranks without waiting for what a GPU still computes.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def max(self, values: list[float]) -> list[float]:
        """Element by element the largest over the ranks."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def sum(self, values: list[float]) -> list[float]:
        """Element by element the sum over the ranks, in float64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def _reduce(self, values: list[float], op: dist.ReduceOp) -> list[float]:
        if self.size == 1:
            return values
        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers, op)
        return numbers.tolist()

    def gather(self, value) -> list:
        """Every rank's value, by rank, on every rank; plain Python objects of our own ranks."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast_buffers(self, model: torch.nn.Module) -> None:
        """Give every rank rank 0's buffers (BatchNorm statistics): one network is evaluated."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def barrier(self) -> None:
        self.max([0.0])


def start_processes() -> World:
    """Join torchrun's process group if there is one, and take this process's device."""
    rank, size, local_rank, local_size = (
        int(os.environ.get(name, default))
        for name, default in (
            ("RANK", 0),
            ("WORLD_SIZE", 1),
            ("LOCAL_RANK", 0),
            ("LOCAL_WORLD_SIZE", 1),
        )
    )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # all batches of a run have one shape
    if size > 1:
        store, *_ = next(dist.rendezvous("env://", rank, size))
        # torchrun keeps its store over a restart, and with it the addresses of ranks that are gone.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore(f"attempt {attempt}", store),
            rank=rank,
            world_size=size,
            device_id=device if device.type == "cuda" else None,
            timeout=datetime.timedelta(minutes=30),
        )
    return World(rank, size, local_rank, local_size, device)


def stop_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
