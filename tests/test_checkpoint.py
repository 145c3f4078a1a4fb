"""training/checkpoint.py: whole or absent, checked before believed, never executed."""

import errno
import io
import os
import pickle
import random
import resource
import zipfile
from contextlib import contextmanager

import pytest
import torch

from common.errors import UserError
from common.files import write_atomic
from training.checkpoint import (
    BEST,
    LATEST,
    PREVIOUS,
    Checkpoints,
    first_nonfinite,
    load_checkpoint,
    serialise,
)


def state(step, size=300):
    weights = torch.full((size,), float(step))
    return {
        "model": {"w": weights, "n": torch.tensor(step)},
        "optimizer": {"state": {0: {"momentum_buffer": weights + 1}}, "param_groups": []},
        "scaler": {},
        "step": step,
        "sums": [[1.5, 2.0]],
        "clock": [0.0, 0.0],
        "rows": [{"epoch": 1, "val_top1": 50.0}],
        "config": {"lr": 0.1, "name": "x"},
        "classes": ["a", "é"],
        "images": 12,
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


def step_of(path):
    loaded, line = load_checkpoint(path)
    assert same(loaded, state(loaded["step"]))
    return loaded["step"], line


def damage(path, position=None):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if position is None else position] ^= 0xFF
    path.unlink()  # hard links share their bytes
    path.write_bytes(data)


def cut(path):
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[: len(data) * 2 // 3])


@pytest.fixture
def saved(tmp_path):
    """A folder with steps 1 (best), 2 and 3 saved."""
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        assert checkpoints.save(state(step), best=step == 1) is None
    return tmp_path


def test_the_latest_its_predecessor_and_the_best_are_kept(saved):
    assert step_of(saved / LATEST) == (3, None)
    assert step_of(saved / PREVIOUS) == (2, None)
    assert step_of(saved / BEST) == (1, None)
    assert sorted(os.listdir(saved)) == sorted([BEST, LATEST, PREVIOUS])  # no temporary files
    Checkpoints(saved).save(state(4), best=True)
    assert [step_of(saved / name)[0] for name in (LATEST, PREVIOUS, BEST)] == [4, 3, 4]


def test_a_folder_without_hard_links_gets_copies(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2):
        assert Checkpoints(tmp_path).save(state(step), best=step == 1) is None
    assert [step_of(tmp_path / name)[0] for name in (LATEST, PREVIOUS, BEST)] == [2, 1, 1]


@pytest.mark.parametrize(
    "spoil", [damage, cut, lambda path: path.write_bytes(b""), lambda path: path.unlink()]
)
def test_a_bad_latest_falls_back_to_its_predecessor_with_one_line(saved, spoil):
    spoil(saved / LATEST)
    step, line = step_of(saved / LATEST)
    assert step == 2
    assert LATEST in line and PREVIOUS in line and "\n" not in line


def test_after_a_fallback_the_good_predecessor_outlives_the_next_save(saved):
    cut(saved / LATEST)
    assert step_of(saved / LATEST)[0] == 2
    assert Checkpoints(saved).save(state(3), best=False) is None
    assert step_of(saved / LATEST) == (3, None)
    assert step_of(saved / PREVIOUS) == (2, None)


def test_both_bad_is_an_error_that_touches_nothing(saved):
    damage(saved / LATEST)
    cut(saved / PREVIOUS)
    before = {path: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(UserError, match="nothing was overwritten") as caught:
        load_checkpoint(saved / LATEST)
    assert LATEST in str(caught.value) and PREVIOUS in str(caught.value)
    assert "\n" not in str(caught.value)
    assert before == {path: path.read_bytes() for path in saved.iterdir()}


def test_only_latest_has_a_predecessor(saved):
    damage(saved / BEST)
    with pytest.raises(UserError, match=r"best\.pt"):
        load_checkpoint(saved / BEST)
    with pytest.raises(UserError, match=r"--resume .*other\.pt: no such file"):
        load_checkpoint(saved / "other.pt")


def test_paths_that_hold_nothing_are_named(tmp_path):
    with pytest.raises(UserError, match=r"--resume .*latest\.pt: no such file"):
        load_checkpoint(tmp_path / LATEST)
    with pytest.raises(UserError, match="directory"):
        load_checkpoint(tmp_path)


def test_flipped_bits_are_found_or_harmless(tmp_path):
    whole = serialise(state(5))
    path, found = tmp_path / "x.pt", 0
    rng = random.Random(0)
    for _ in range(30):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            loaded, _ = load_checkpoint(path)
        except UserError as error:
            assert "\n" not in str(error)
            found += 1
        else:
            assert same(loaded, state(5))
    assert found > 5


def test_every_flip_in_a_tensor_is_found(tmp_path):
    whole, path = serialise(state(5)), tmp_path / "x.pt"
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        record = max(archive.infolist(), key=lambda info: info.file_size)
        start = whole.index(archive.read(record))
    for position in range(start, start + record.file_size, 97):
        path.write_bytes(whole)
        damage(path, position)
        with pytest.raises(UserError, match="checksum"):
            load_checkpoint(path)


# ------------------------------------------------------------------ saves that fail


@contextmanager
def full_disk():
    """No file may grow beyond 1 KB; Python ignores SIGXFSZ, so that writing raises OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_two_failed_saves_warn_the_third_stops_and_the_old_files_stay_whole(saved):
    checkpoints = Checkpoints(saved)
    for _ in (1, 2):
        with full_disk():
            warning = checkpoints.save(state(9), best=True)
        assert warning.startswith("warning: ") and str(saved) in warning and "\n" not in warning
        assert [step_of(saved / name)[0] for name in (LATEST, PREVIOUS, BEST)] == [3, 2, 1]
    with full_disk(), pytest.raises(UserError, match="3 times in a row: free space"):
        checkpoints.save(state(9), best=True)
    assert [step_of(saved / name)[0] for name in (LATEST, PREVIOUS, BEST)] == [3, 2, 1]
    assert sorted(os.listdir(saved)) == sorted([BEST, LATEST, PREVIOUS])


def test_a_save_that_works_forgives_the_failures_before(saved):
    checkpoints = Checkpoints(saved)
    for _ in range(3):
        with full_disk():
            assert checkpoints.save(state(9), best=False)
            assert checkpoints.save(state(9), best=False)
        assert checkpoints.save(state(4), best=False) is None


def test_a_save_that_fails_at_its_last_step_leaves_nothing_behind(saved, monkeypatch):
    replace = os.replace

    def refuse(source, target):
        if os.path.basename(target) == LATEST:
            raise OSError(errno.EIO, "Input/output error")
        return replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        assert "Input/output error" in Checkpoints(saved).save(state(4), best=False)
    assert sorted(os.listdir(saved)) == sorted([BEST, LATEST, PREVIOUS])
    assert step_of(saved / LATEST) == (3, None)


def test_write_atomic_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    with full_disk(), pytest.raises(OSError):
        write_atomic(path, bytes(5000))
    assert os.listdir(tmp_path) == ["file"] and path.read_bytes() == b"old"
    write_atomic(path, b"new")
    assert os.listdir(tmp_path) == ["file"] and path.read_bytes() == b"new"


class Killed(BaseException):
    pass


@pytest.mark.parametrize("call", range(20))
def test_a_process_killed_at_any_point_of_a_save_leaves_a_whole_latest(saved, monkeypatch, call):
    calls = [0]

    def dying(function):
        def wrapper(*args, **kwargs):
            calls[0] += 1
            if calls[0] > call:  # from here on nothing is done any more
                raise Killed
            return function(*args, **kwargs)

        return wrapper

    finished = True
    with monkeypatch.context() as patch:
        for name in ("replace", "link", "fsync", "unlink"):
            patch.setattr(os, name, dying(getattr(os, name)))
        try:
            Checkpoints(saved).save(state(4), best=True)
        except Killed:
            finished = False
    assert (saved / LATEST).exists()
    step, line = step_of(saved / LATEST)
    assert step in (3, 4) and line is None
    assert step_of(saved / BEST)[0] == 4 or step == 3  # latest never tells of a best not there
    assert finished == (call >= calls[0])
    assert Checkpoints(saved).save(state(5), best=True) is None
    assert step_of(saved / LATEST)[0] == step_of(saved / BEST)[0] == 5


# ------------------------------------------------------------------ hostile and wrong files


class Code:
    """A pickle that would write a file."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return open, (self.target, "w")


@pytest.mark.parametrize(
    "write",
    [
        lambda path, value: torch.save(value, path),
        lambda path, value: torch.save(value, path, _use_new_zipfile_serialization=False),
        lambda path, value: path.write_bytes(pickle.dumps(value)),
    ],
)
@pytest.mark.parametrize("name", [LATEST, "x.pt"])
def test_files_that_carry_code_are_refused_and_run_nothing(tmp_path, write, name):
    target = tmp_path / "written"
    write(tmp_path / name, {**state(1), "config": Code(target)})
    with pytest.raises(UserError, match=name) as caught:
        load_checkpoint(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert not target.exists()


def test_code_in_latest_is_no_damage_to_fall_back_from(saved):
    torch.save({**state(1), "config": Code(saved / "written")}, saved / LATEST)
    with pytest.raises(UserError, match="can run code"):
        load_checkpoint(saved / LATEST)
    assert not (saved / "written").exists()


@pytest.mark.parametrize(
    "value",
    [
        {"conv1.weight": torch.ones(3)},
        [1, 2],
        torch.ones(2),
        {k: v for k, v in state(1).items() if k != "optimizer"},
    ],
)
def test_weights_are_no_checkpoint(tmp_path, value):
    torch.save(value, tmp_path / "w.pt")
    with pytest.raises(UserError, match="a weights file cannot be resumed"):
        load_checkpoint(tmp_path / "w.pt")


@pytest.mark.parametrize("content", [b"", b".", b"0.", b"}(u.", b"K\x01K\x02s.", b"hello"])
def test_a_pickle_that_makes_no_sense_is_one_line_too(tmp_path, content):
    """A well-formed archive around it, with right checksums."""
    torch.save(state(1), tmp_path / "good.pt")
    with (
        zipfile.ZipFile(tmp_path / "good.pt") as old,
        zipfile.ZipFile(tmp_path / "bad.pt", "w") as new,
    ):
        for info in old.infolist():
            data = content if info.filename.endswith("data.pkl") else old.read(info)
            new.writestr(info.filename, data)
    with pytest.raises(UserError, match=r"bad\.pt"):
        load_checkpoint(tmp_path / "bad.pt")


def test_an_archive_of_something_else_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(UserError, match=r"x\.pt cannot be loaded"):
        load_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (
            {"a": torch.ones(2), "b": {"c": [torch.ones(1), torch.tensor([1.0, float("nan")])]}},
            "b.c.1",
        ),
        ({"a": torch.tensor(float("inf"))}, "a"),
        ({"a": (torch.tensor(-float("inf")),), "b": torch.tensor(float("nan"))}, "a.0"),
        (
            {0: {"momentum_buffer": torch.full((2, 2), float("nan"), dtype=torch.bfloat16)}},
            "0.momentum_buffer",
        ),
        ({"a": torch.ones(3), "n": torch.tensor(7), "t": "nan", "f": None, "l": []}, None),
        (state(1), None),
    ],
)
def test_first_nonfinite(value, expected):
    assert first_nonfinite(value) == expected
