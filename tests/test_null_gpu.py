"""What training asks of a GPU, counted on the null GPU of tests/null_gpu, which has no real one."""

import json
import subprocess
import sys

import pytest
from null_gpu.build import HERE, CannotBuild, build, make_environment


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
    assert 100 < result["kernels"] <= 170
    assert result["channels_last"]


def test_randaugments_tables_are_computed_on_the_cpu(null_gpu):
    assert measure(null_gpu, "tables") == {"same": True}
