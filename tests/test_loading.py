"""data/loading.py: a rank's share of each step and of an evaluation, on any number of workers."""

import multiprocessing
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from common.cli import explain_error
from common.errors import UserError
from data import loading
from data.images import EvalSet, ImageFiles, TrainSet
from data.loading import EvalLoader, TrainLoader, check_worker_limits
from data.sampling import StepSampler
from data.transforms import EvalTransform, TrainTransform
from training import engine
from training.distributed import DistributedContext


@pytest.fixture
def source(tmp_path):
    names = []
    for i in range(11):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        names.append(f"{i}.png")
        Image.fromarray(pixels).save(tmp_path / names[-1])
    (tmp_path / "3.png").write_bytes(b"broken")
    return ImageFiles(tmp_path, np.array([n.encode() for n in names]), np.arange(11) % 2)


def steps(source, *, first=0, last=5, workers=0, rank=0, world=1, micro_batches=2):
    sampler = StepSampler(
        len(source), seed=1, micro_batch=2, micro_batches=micro_batches, rank=rank, world_size=world
    )
    loader = TrainLoader(TrainSet(source, TrainTransform(16), 1), sampler, workers=workers)
    assert loader.steps_per_epoch == sampler.steps_per_epoch
    assert loader.file_name(3) == source.file_name(3)
    return list(loader.steps(first, last))


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def all_equal(run, other):
    pairs = [(a, b) for s, t in zip(run, other, strict=True) for a, b in zip(s, t, strict=True)]
    return all(equal(a, b) for a, b in pairs)


def test_a_step_is_a_list_of_this_ranks_micro_batches(source):
    run = steps(source)
    assert [len(step) for step in run] == [2] * 5
    batch = run[0][0]
    assert batch.image.shape == (2, 3, 16, 16) and batch.image.dtype == torch.uint8
    assert batch.draws.shape == (2, 2, 2)
    assert torch.equal(batch.label, batch.index % 2)
    assert sorted(torch.cat([b.index for step in run[:2] for b in step]).tolist()) == sorted(
        set(range(11)) - set(rest_of_first_epoch(source))
    )


def rest_of_first_epoch(source):
    return StepSampler(11, seed=1, micro_batch=2, micro_batches=2).order(0)[8:].tolist()


def test_two_workers_and_none_give_the_same_bits(source):
    torch.manual_seed(1)
    alone = steps(source)
    torch.manual_seed(2)
    assert all_equal(alone, steps(source, workers=2))
    assert any(batch.broken.any() for step in alone for batch in step)


def test_a_resumed_run_sees_the_tail_and_not_the_first_epoch_again(source):
    whole = steps(source, last=6)
    assert all_equal(steps(source, first=3, last=6), whole[3:])
    assert not all_equal(whole[:2], whole[2:4])
    assert steps(source, first=6, last=6) == []


def test_ranks_share_the_micro_batches_of_one(source):
    alone = steps(source)
    for rank in (0, 1):
        theirs = steps(source, rank=rank, world=2)
        assert all_equal(theirs, [step[rank::2] for step in alone])


def evaluated(source, world, *, batch_size=4, workers=0):
    """By rank the batches, each as a list of indices."""
    ranks = []
    for rank in range(world):
        dataset = EvalSet(source, EvalTransform(16))
        loader = EvalLoader(
            dataset, batch_size=batch_size, workers=workers, rank=rank, world_size=world
        )
        assert loader.dataset is dataset and loader.file_name(2) == source.file_name(2)
        ranks.append([batch.index.tolist() for batch in loader])
    return ranks


@pytest.mark.parametrize(
    ("world", "batch_size", "expected"),
    [
        (1, 4, [[4, 4, 3]]),
        (2, 4, [[4, 3], [4]]),
        (3, 4, [[4], [4], [3]]),
        (2, 32, [[11], []]),  # smaller than one batch: one rank has nothing
        (4, 4, [[4], [4], [3], []]),
        (2, 1, [[1] * 6, [1] * 5]),
    ],
)
def test_every_image_is_evaluated_exactly_once(source, world, batch_size, expected):
    ranks = evaluated(source, world, batch_size=batch_size)
    assert [[len(batch) for batch in rank] for rank in ranks] == expected
    assert sorted(i for rank in ranks for batch in rank for i in batch) == list(range(11))


def test_an_image_is_in_the_same_batch_on_any_number_of_ranks(source):
    def cut(world):
        return {tuple(batch) for rank in evaluated(source, world) for batch in rank}

    assert cut(1) == cut(2) == cut(3)


def test_an_evaluation_can_be_repeated_with_workers_that_stay(source):
    loader = EvalLoader(EvalSet(source, EvalTransform(16)), batch_size=4, workers=1)
    first, second = list(loader), list(loader)
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.cat([b.broken for b in first]).nonzero().flatten().tolist() == [3]


# ------------------------------------------------------------------ limits of the machine


def in_child(work):
    """What `work` returns in a forked process, whose limits are its own."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.write(writing, str(work()).encode())
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = pipe.read()
    os.waitpid(process, 0)
    return told


@pytest.mark.parametrize("limit", [24, 40])
def test_too_low_a_limit_of_open_files_is_one_line(source, limit):
    def work(workers):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        return len(steps(source, workers=workers))

    told = in_child(lambda: work(workers=2))
    assert told.startswith("UserError: 2 loader workers need about 128 open files and the limit is")
    assert f"{limit}: raise it with ulimit -n 128, or use fewer --workers (0 needs none)" in told
    assert in_child(lambda: work(workers=0)) == "5"


def test_a_low_soft_limit_of_open_files_is_raised(source):
    def work():
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 4096))
        return len(steps(source, workers=2))

    assert in_child(work) == "5"


def test_too_little_shared_memory_is_one_line(source, monkeypatch):
    monkeypatch.setattr(loading, "usable_cpus", lambda: 8)
    usage = shutil.disk_usage("/")._replace(free=2 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(loading, "SHARED_MEMORY", Path("/"))
    check_worker_limits(0)
    check_worker_limits(2)
    message = "2.0 MB free, too little for 3 loader workers: .* --shm-size .* --workers 0"
    with pytest.raises(UserError, match=message):
        check_worker_limits(3)
    dataset = EvalSet(source, EvalTransform(16))
    with pytest.raises(UserError, match=message):
        EvalLoader(dataset, batch_size=4, workers=3)
    monkeypatch.setattr(loading, "SHARED_MEMORY", Path("/nowhere"))  # not on this system
    check_worker_limits(3)


def test_a_killed_worker_is_one_line_that_names_the_flag(source):
    loader = EvalLoader(EvalSet(source, EvalTransform(16)), batch_size=1, workers=1)
    batches = iter(loader)
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    worker.join()
    with pytest.raises(RuntimeError) as caught:
        list(batches)
    line, code = explain_error(caught.value)
    assert code == 1 and line.startswith("error: a loader worker was killed")
    assert "use fewer --workers" in line


def test_an_evaluation_keeps_no_file_open_for_each_batch(source, monkeypatch):
    """A tensor from a worker is a shared file, and a process may open about a thousand."""
    many = ImageFiles(source.root, np.tile(source.files, 8), np.tile(source.labels, 8))
    loader = EvalLoader(EvalSet(many, EvalTransform(16)), batch_size=1, workers=1)
    opened = []

    def classify(*args, real=engine.classify, **kwargs):
        for batch in real(*args, **kwargs):
            yield batch
            opened.append(len(os.listdir("/proc/self/fd")))

    monkeypatch.setattr(engine, "classify", classify)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    engine.Evaluator(loader, DistributedContext(), "fp32").run(model)
    assert len(opened) == 88 and opened[-1] - opened[10] < 20
