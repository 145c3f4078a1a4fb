"""The processes of a run: one without torchrun, any number with it, on CPUs or GPUs."""

import datetime
import os
import secrets
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from common.errors import UserError
from common.processes import read_integer

# The ranks synchronise through gloo before each step, and that wait may be long: rank 0 may be
# writing to a slow disk. NCCL's own operations follow at once: a long wait there is a hung GPU.
CONTROL_TIMEOUT = datetime.timedelta(minutes=30)
NCCL_TIMEOUT = datetime.timedelta(minutes=10)


@dataclass(frozen=True)
class DistributedContext:
    """This process among the processes of the run.

    The collectives take and return plain numbers. They use the CPU's gloo backend, so that they
    order the ranks without waiting for the GPU; with a single process they do nothing.
    """

    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    device: torch.device = torch.device("cpu")
    control: dist.ProcessGroup | None = None  # the gloo group of the collectives below

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def max(self, values: list[float]) -> list[float]:
        """Element-wise maximum over the ranks."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over the ranks, in float64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def _reduce(self, values: list[float], op: dist.ReduceOp) -> list[float]:
        if self.world_size == 1:
            return values
        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers, op, group=self.control)
        return numbers.tolist()

    def gather(self, value) -> list:
        """The values of all ranks, by rank, on every rank; any picklable object."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def broadcast_buffers(self, model: torch.nn.Module) -> None:
        """Give every rank the buffers of rank 0 (BatchNorm statistics), before an evaluation."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def barrier(self) -> None:
        self.max([0.0])


def init_distributed() -> DistributedContext:
    """Join the process group that torchrun describes, if there is one, and choose the device.

    Raises UserError where the environment variables are incomplete, or GPUs are missing.
    """
    rank, world_size = read_integer("RANK", 0), read_integer("WORLD_SIZE", 1)
    local_rank = read_integer("LOCAL_RANK", 0)
    local_world_size = read_integer("LOCAL_WORLD_SIZE", 1)

    # This process's device.
    device = torch.device("cpu")
    if torch.cuda.is_available():
        visible = torch.cuda.device_count()
        if visible == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
            local_rank = 0  # a scheduler such as srun shows each process its own GPU
        if local_rank >= visible:
            raise UserError(
                f"torchrun started {local_world_size} processes on this machine, which has "
                f"{visible} visible GPUs: use --nproc_per_node={visible}"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # the shape of the batches changes rarely, if ever
    if world_size == 1:
        return DistributedContext(device=device)

    # The process group.
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {world_size} but {' and '.join(missing)} not set: start the script "
            "with torchrun, or unset RANK and WORLD_SIZE"
        )
    read_integer("MASTER_PORT", 0)
    if rank >= world_size:
        raise UserError(
            f"RANK is {rank} and WORLD_SIZE {world_size}: start the script with torchrun, or unset "
            "both"
        )
    store, *_ = next(dist.rendezvous("env://", rank, world_size))
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.PrefixStore(agree_on_token(store, rank, world_size), store),
        rank=rank,
        world_size=world_size,
        device_id=device if on_gpu else None,
        timeout=NCCL_TIMEOUT if on_gpu else CONTROL_TIMEOUT,
    )
    control = (
        dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT) if on_gpu else dist.group.WORLD
    )
    return DistributedContext(rank, world_size, local_world_size, device, control)


def agree_on_token(store: dist.Store, rank: int, world_size: int) -> str:
    """A token shared by the ranks of this start, and by no earlier start.

    torchrun keeps its store over a restart, and in it the addresses of ranks that have died. Its
    TORCHELASTIC_RESTART_COUNT does not tell starts apart: each machine counts only the failures of
    its own ranks. Raises ConnectionError on rank 0 where others are missing for CONTROL_TIMEOUT.
    """
    own = secrets.token_hex(8)
    store.set(f"hello {rank}", own)
    if rank > 0:
        token = store.get(f"token for {own}").decode()
        store.set(f"{own} has {token}", "")
        return token
    # A token found here may be that of a dead rank, so rank 0 looks again until each has answered.
    missing = set(range(1, world_size))
    deadline = time.monotonic() + CONTROL_TIMEOUT.total_seconds()
    while missing:
        if time.monotonic() > deadline:
            names = ", ".join(map(str, sorted(missing)))
            raise ConnectionError(f"ranks {names} did not come: see their errors, then start again")
        for other in sorted(missing):
            theirs = store.get(f"hello {other}").decode()
            store.set(f"token for {theirs}", own)
            if store.check([f"{theirs} has {own}"]):
                missing.remove(other)
        time.sleep(0.05)
    return own


def shut_down_distributed() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
