"""training/distributed.py: torchrun's environment, whole, incomplete or wrong."""

import datetime
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from common.errors import UserError
from training import distributed
from training.distributed import DistributedContext, agree_on_token, init_distributed

RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    for name in (*RANKS, "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def with_environment(monkeypatch, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return init_distributed()


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": "", "LOCAL_WORLD_SIZE": ""},
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "", "MASTER_PORT": ""},
    ],
)
def test_one_process_needs_no_variables(monkeypatch, variables):
    context = with_environment(monkeypatch, **variables)
    assert context == DistributedContext()
    assert context.is_main and context.device.type == "cpu"
    assert context.sum([1.5, 2]) == [1.5, 2] and context.max([3]) == [3]
    assert context.gather("x") == ["x"]
    context.barrier()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE is 2 but MASTER_ADDR and MASTER_PORT not"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x"}, "but MASTER_PORT not set"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "", "MASTER_PORT": "1"},
            "but MASTER_ADDR not set: start the script with torchrun, or unset RANK and WORLD_SIZE",
        ),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a number: unset it"),
        ({"RANK": "-1"}, "RANK is '-1', not a number"),
        ({"LOCAL_RANK": "0.5"}, "LOCAL_RANK is '0.5', not a number"),
        ({"LOCAL_WORLD_SIZE": "all"}, "LOCAL_WORLD_SIZE is 'all', not a number"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "y"},
            "MASTER_PORT is 'y', not a number",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
            "RANK is 2 and WORLD_SIZE 2: start the script with torchrun, or unset both",
        ),
        (
            {"WORLD_SIZE": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
            "RANK is 0 and WORLD_SIZE 0",
        ),
    ],
)
def test_incomplete_or_wrong_variables_are_one_line(monkeypatch, variables, message):
    with pytest.raises(UserError, match=message) as caught:
        with_environment(monkeypatch, **variables)
    assert "\n" not in str(caught.value)


def test_more_processes_than_gpus_is_one_line_that_names_both(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with pytest.raises(
        UserError, match="started 4 processes .* has 2 visible GPUs: use --nproc_per_node=2"
    ):
        with_environment(
            monkeypatch, RANK="2", LOCAL_RANK="2", WORLD_SIZE="4", LOCAL_WORLD_SIZE="4"
        )
    assert chosen == []
    assert with_environment(monkeypatch, LOCAL_RANK="1", WORLD_SIZE="1").device.index == 1
    assert chosen == [torch.device("cuda", 1)]


# ---------------------------------------------------------------- restarts


def start(store, order, pause=0.02):
    """The words on which ranks agree that start one after the other, by rank."""
    with ThreadPoolExecutor(len(order)) as pool:
        futures = {}
        for rank in order:
            futures[rank] = pool.submit(agree_on_token, store, rank, len(order))
            time.sleep(pause)
        return [futures[rank].result(timeout=20) for rank in range(len(order))]


def test_ranks_agree_in_any_order_and_never_with_those_of_an_earlier_start():
    store = dist.HashStore()
    seen = set()
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):  # restarts, all with one store
        words = start(store, order)
        assert len(set(words)) == 1 and words[0] not in seen
        seen.update(words)


def test_what_a_start_that_failed_left_in_the_store_is_not_used():
    store = dist.HashStore()
    for rank in range(3):
        store.set(f"hello {rank}", f"dead {rank}")
    store.set("token for dead 1", "dead 0")
    store.set("dead 1 has dead 0", "")
    words = start(store, [0, 2, 1], pause=0.2)
    assert len(set(words)) == 1 and words[0] != "dead 0"


def test_a_rank_that_does_not_come_back_is_an_error_after_a_while(monkeypatch):
    monkeypatch.setattr(distributed, "CONTROL_TIMEOUT", datetime.timedelta(seconds=0.2))
    store = dist.HashStore()
    store.set("hello 1", "dead 1")
    with pytest.raises(ConnectionError, match="ranks 1 did not come"):
        agree_on_token(store, 0, 2)
