"""What training asks of a GPU, counted on the null GPU of tests/null_gpu, which has no real one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from null_gpu.build import HERE, CannotBuild, build, make_environment

from data.synthetic import write_imagenet_tree
from models import MODELS

ROOT = HERE.parent.parent


@pytest.fixture(scope="session")
def null_gpu():
    """The folder of the null GPU's libraries."""
    try:
        return build()
    except CannotBuild as reason:
        pytest.skip(f"no null GPU: {reason}")


def measure(null_gpu, *arguments):
    """The result of one of measure.py's measurements, in a process of its own."""
    done = subprocess.run(
        [sys.executable, HERE / "measure.py", *arguments],
        env=make_environment(null_gpu),
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("MEASURED ")]
    assert done.returncode == 0 and len(lines) == 1, done.stdout + done.stderr
    return json.loads(lines[0].removeprefix("MEASURED "))


def test_augmentation_never_waits_for_the_gpu_and_copies_from_pinned_memory_only(null_gpu):
    result = measure(null_gpu, "augment")
    assert result["waits"] == result["pageable"] == 0
    assert result["pinned"] == 1  # the order of RandAugment's images
    assert 100 < result["kernels"] <= 160
    assert result["channels_last"]
    assert result["same_tables"]  # RandAugment's, as computed on the CPU


def test_a_training_step_never_waits_for_the_gpu_and_copies_from_pinned_memory_only(null_gpu):
    steps = measure(null_gpu, "steps")
    assert set(steps) == {
        f"{name} {precision}" for name in MODELS for precision in ("bf16", "fp16")
    }
    for name, (kernels, waits, pageable) in steps.items():
        assert kernels > 500 and waits == pageable == 0, (name, kernels, waits, pageable)


def test_the_training_step_stays_within_its_numbers_of_kernels_and_its_memory(null_gpu):
    """256 images of 224 × 224 in bf16, with RandAugment and mixing."""
    resnet, twistnet = (
        measure(null_gpu, "step", "resnet18"),
        measure(null_gpu, "step", "twistnet18"),
    )
    assert 300 < resnet["kernels"] <= 520
    assert resnet["kernels"] < twistnet["kernels"] <= 1150
    assert 3000 < resnet["peak_mb"] < 4000
    assert twistnet["peak_mb"] < 1.1 * resnet["peak_mb"]
    for result in (resnet, twistnet):
        assert result["waits"] == result["pageable"] == 0
        assert result["grown_mb"] == result["allocations"] == 0


def test_an_evaluation_waits_for_the_gpu_twice_however_many_batches_it_has(null_gpu):
    for result in measure(null_gpu, "evaluate").values():
        assert result["waits"] <= 2 and result["images"] == 39


def test_pretraining_on_two_gpus_is_stopped_by_sigusr1_and_resumed_on_one(null_gpu, tmp_path):
    write_imagenet_tree(
        tmp_path / "tree", train_per_class=6, val_per_class=3, size=70, seed=0, num_classes=3
    )
    script = [str(HERE / "run_script.py"), str(ROOT / "pretrain_imagenet.py")]
    flags = ["--data_dir", "tree", "--workers", "1"]
    recipe = ["--recipe", "fast", "--img_size", "64", "--batch_size", "4"]

    # Train on two devices until an epoch is in the log, then signal one rank.
    run = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        + [*script, *flags, *recipe, "--epochs", "100000"],
        env=make_environment(null_gpu, devices=2),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        log = Path("checkpoints/log.jsonl")
        deadline = time.monotonic() + 120
        while not (log.exists() and log.read_text().count("\n")):
            assert run.poll() is None and time.monotonic() < deadline, run.communicate()[0]
            time.sleep(0.1)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGUSR1)
        output = run.communicate(timeout=120)[0]
    finally:
        run.kill()
    assert "preempted" in output and "resume with: " in output, output
    state = torch.load("checkpoints/latest.pt", weights_only=True)
    assert state["config"]["micro_batches"] == 2

    # Resume on one device, for one more epoch.
    epochs = log.read_text().count("\n") + 1
    done = subprocess.run(
        [sys.executable, *script, *flags, "--resume", "checkpoints/latest.pt"]
        + ["--epochs", str(epochs)],
        env=make_environment(null_gpu),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert log.read_text().count("\n") == epochs
    assert Path("weights/twistnet18_imagenet.pt").exists()
