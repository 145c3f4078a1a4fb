"""common/processes.py: CPUs per rank, integers of the environment, and signals."""

import os

import pytest

from common.errors import UserError
from common.processes import read_integer, usable_cpus


@pytest.mark.parametrize(
    ("cpus", "ranks", "expected"),
    [(8, None, 8), (8, "", 8), (8, "2", 4), (8, "3", 2), (2, "8", 1), (8, "0", 8)],
)
def test_the_ranks_of_a_machine_share_its_cpus(monkeypatch, cpus, ranks, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cpus), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert usable_cpus() == expected


def test_cpus_are_counted_where_there_is_no_affinity(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cpus() == 1


@pytest.mark.parametrize("value", ["x", "-1", "1.5", " ", "²"])
def test_a_variable_that_is_not_a_number_is_one_line(monkeypatch, value):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
    with pytest.raises(UserError, match="LOCAL_WORLD_SIZE is .*, not a number: unset it"):
        usable_cpus()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "12")
    assert read_integer("LOCAL_WORLD_SIZE", 3) == 12
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert read_integer("LOCAL_WORLD_SIZE", 3) == 3
