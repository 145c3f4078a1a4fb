"""training/checkpoint.py: files are whole or absent, verified on load, and never executed."""

import errno
import io
import os
import pickle
import random
import zipfile

import pytest
import torch

from common.errors import UserError
from training import checkpoint
from training.checkpoint import (
    BEST,
    FRESH_BEST,
    LATEST,
    PREVIOUS,
    Checkpointer,
    TrainState,
    copy_to_host,
    find_nonfinite,
    load_checkpoint,
    read_epoch,
    require_checkpoint,
    serialise,
)


def content(step, size=300):
    """A checkpoint's content, whose epoch has two finished steps."""
    weights = torch.full((size,), float(step))
    tensors = {
        "model": {"w": weights, "n": torch.tensor(step)},
        "optimizer": {"state": {0: {"momentum_buffer": weights + 1}}, "param_groups": []},
        "scaler": {},
    }
    state = TrainState({"lr": 0.1, "name": "x"}, ["a", "é"], 12, "digest", {"source": "none"})
    state.step, state.epoch, state.best_epoch = step, 1, 1
    state.history = [{"epoch": 1, "val_top1": 50.0}]
    state.loss_sums, state.grad_norms = [[1.5, 2.0]], [0.1, 2.5]
    state.seconds, state.data_wait, state.unreadable = 1.25, 0.5, ["x.jpg"]
    return state.to_dict(tensors)


def old_content(step):
    """The same checkpoint in the format of before TrainState, without gradient norms."""
    new = content(step)
    return {
        **{name: new[name] for name in ("model", "optimizer", "scaler", "step", "config")},
        "classes": ["a", "é"],
        "sums": [[1.5, 2.0]],
        "clock": [1.25, 0.5],
        "rows": [{"epoch": 1, "val_top1": 50.0}],
        "broken": ["x.jpg"],
        "images": 12,
        "data": "digest",
        "weights": {"source": "none"},
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


def step_of(path):
    """The step of a checkpoint, all of which must have come back, and the warning."""
    state, tensors, line = load_checkpoint(path)
    assert same(state.to_dict(tensors), content(state.step))
    return state.step, line


def save(checkpointer, step, *, best=False):
    """Save and wait; the warning."""
    warning = checkpointer.save(content(step), best=best)
    return checkpointer.join() or warning


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
    checkpointer = Checkpointer(tmp_path)
    for step in (1, 2, 3):
        assert save(checkpointer, step, best=step == 1) is None
    return tmp_path


def test_the_latest_its_predecessor_and_the_best_are_kept(saved):
    assert step_of(saved / LATEST) == (3, None)
    assert step_of(saved / PREVIOUS) == (2, None)
    assert step_of(saved / BEST) == (1, None)
    assert sorted(os.listdir(saved)) == sorted([BEST, LATEST, PREVIOUS])  # no temporary files
    save(Checkpointer(saved), 4, best=True)
    assert [step_of(saved / name)[0] for name in (LATEST, PREVIOUS, BEST)] == [4, 3, 4]


def test_a_folder_without_hard_links_gets_copies(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2):
        assert save(Checkpointer(tmp_path), step, best=step == 1) is None
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
    assert save(Checkpointer(saved), 3, best=False) is None
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


def test_paths_without_a_checkpoint_are_named(tmp_path):
    with pytest.raises(UserError, match=r"--resume .*latest\.pt: no such file"):
        load_checkpoint(tmp_path / LATEST)
    with pytest.raises(UserError, match=r"is a folder: give .*latest\.pt$"):
        load_checkpoint(tmp_path)


def test_what_is_copied_over_one_checkpoint_does_not_change_another(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    for step in (1, 2):
        checkpointer.save(content(step), best=step == 1)
        checkpointer.join()
    with open(tmp_path / PREVIOUS, "r+b") as file:  # as cp does when a backup is restored
        file.write(b"x" * 100)
    assert read_epoch(tmp_path / BEST) is not None


def test_where_only_best_is_left_the_error_says_that_it_can_be_resumed(saved):
    (saved / LATEST).unlink()
    require_checkpoint(saved / LATEST)  # its predecessor will do
    (saved / PREVIOUS).unlink()
    with pytest.raises(UserError, match=r"no such file; --resume .*best\.pt is possible"):
        require_checkpoint(saved / LATEST)


def test_flipped_bits_are_found_or_harmless(tmp_path):
    whole = serialise(content(5))
    path, found = tmp_path / "x.pt", 0
    rng = random.Random(0)
    for _ in range(30):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            state, tensors, _ = load_checkpoint(path)
        except UserError as error:
            assert "\n" not in str(error)
            found += 1
        else:
            assert same(state.to_dict(tensors), content(5))
    assert found > 5


def test_every_flip_in_a_tensor_is_found(tmp_path):
    whole, path = serialise(content(5)), tmp_path / "x.pt"
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        record = max(archive.infolist(), key=lambda info: info.file_size)
        start = whole.index(archive.read(record))
    for position in range(start, start + record.file_size, 97):
        path.write_bytes(whole)
        damage(path, position)
        with pytest.raises(UserError, match="checksum"):
            load_checkpoint(path)


def test_a_checkpoint_that_the_file_server_withholds_is_not_taken_for_damaged(saved, monkeypatch):
    def fail(path):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(zipfile, "ZipFile", fail)
        for read in (
            lambda: load_checkpoint(saved / LATEST),
            lambda: checkpoint.recover_best(saved, TrainState({}, [], 0, best_epoch=1)),
        ):
            with pytest.raises(OSError, match="Stale file handle"):
                read()


def test_a_checkpoint_on_a_bad_sector_is_damaged(saved, monkeypatch):
    read = zipfile.ZipFile

    def fail(path):
        if path.name == LATEST:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read(path)

    monkeypatch.setattr(zipfile, "ZipFile", fail)
    _, _, warning = load_checkpoint(saved / LATEST)
    assert "latest.pt cannot be read (Input/output error); resuming from" in warning


# ------------------------------------------------------------------ saves that fail


def test_two_failed_saves_warn_the_third_stops_and_the_old_files_stay_intact(saved, full_disk):
    checkpointer = Checkpointer(saved)
    for _ in (1, 2):
        with full_disk():
            warning = save(checkpointer, 9, best=True)
        assert warning.startswith("warning: ") and str(saved) in warning and "\n" not in warning
        assert [step_of(saved / name)[0] for name in (LATEST, PREVIOUS, BEST)] == [3, 2, 1]
    with full_disk(), pytest.raises(UserError, match="3 times in a row: free space"):
        save(checkpointer, 9, best=True)
    assert [step_of(saved / name)[0] for name in (LATEST, PREVIOUS, BEST)] == [3, 2, 1]
    assert sorted(os.listdir(saved)) == sorted([BEST, LATEST, PREVIOUS])


def test_a_save_that_works_resets_the_count_of_failures(saved, full_disk):
    checkpointer = Checkpointer(saved)
    for _ in range(3):
        with full_disk():
            assert save(checkpointer, 9, best=False)
            assert save(checkpointer, 9, best=False)
        assert save(checkpointer, 4, best=False) is None


def test_a_save_that_fails_at_its_last_step_leaves_nothing_behind(saved, monkeypatch):
    replace = os.replace

    def refuse(source, target):
        if os.path.basename(target) == LATEST:
            raise OSError(errno.EIO, "Input/output error")
        return replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        assert "Input/output error" in save(Checkpointer(saved), 4, best=False)
    assert sorted(os.listdir(saved)) == sorted([BEST, LATEST, PREVIOUS])
    assert step_of(saved / LATEST) == (3, None)


def test_a_failed_write_is_reported_by_the_next_save_which_writes_what_it_owes(saved, full_disk):
    checkpointer = Checkpointer(saved)
    with full_disk():
        assert checkpointer.save(content(4), best=True) is None
        checkpointer._thread.join()
    warning = checkpointer.save(content(5), best=False)
    assert warning.startswith("warning: the checkpoint could not be written to ")
    assert checkpointer.join() is None
    assert [step_of(saved / name)[0] for name in (LATEST, PREVIOUS, BEST)] == [5, 3, 4]
    assert checkpointer.save(content(6), best=False) is None  # once
    checkpointer.join()


def test_an_error_of_the_writer_that_is_not_the_disks_is_raised(tmp_path, monkeypatch):
    def fail(state):
        raise MemoryError("no memory")

    monkeypatch.setattr(checkpoint, "serialise", fail)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(content(1), best=False)
    with pytest.raises(MemoryError):
        checkpointer.join()


def test_a_copy_on_the_host_is_not_changed_by_training():
    state = {"a": torch.ones(2), "b": [torch.ones(1), 3], "c": {"d": (torch.zeros(1),)}, "e": "x"}
    copied = copy_to_host(state)
    assert same(copied, state)
    for tensor in (state["a"], state["b"][0], state["c"]["d"][0]):
        tensor += 1
    assert copied["a"].tolist() == [1, 1] and copied["b"] == [torch.ones(1), 3]
    assert copied["c"]["d"][0].item() == 0


def test_a_copy_on_the_host_keeps_strides_and_types():
    weight = torch.randn(2, 3, 4, 4).to(torch.bfloat16, memory_format=torch.channels_last)
    copied = copy_to_host(weight)
    assert (copied.stride(), copied.dtype) == (weight.stride(), weight.dtype)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("call", range(20))
def test_a_process_killed_at_any_point_of_a_save_leaves_a_whole_latest(saved, monkeypatch, call):
    calls = [0]

    def dying(function):
        def wrapper(*args, **kwargs):
            calls[0] += 1
            if calls[0] > call:  # from here on nothing is done
                raise Killed
            return function(*args, **kwargs)

        return wrapper

    finished = True
    with monkeypatch.context() as patch:
        for name in ("replace", "link", "fsync", "unlink"):
            patch.setattr(os, name, dying(getattr(os, name)))
        try:
            save(Checkpointer(saved), 4, best=True)
        except Killed:
            finished = False
    assert (saved / LATEST).exists()
    step, line = step_of(saved / LATEST)
    assert step in (3, 4) and line is None
    # latest.pt never refers to a best epoch that is missing, or that recover_best does not restore
    best = saved / FRESH_BEST if (saved / FRESH_BEST).exists() else saved / BEST
    assert step == 3 or step_of(best)[0] == 4
    assert finished == (call >= calls[0])
    assert save(Checkpointer(saved), 5, best=True) is None
    assert step_of(saved / LATEST)[0] == step_of(saved / BEST)[0] == 5


# ------------------------------------------------------------------ older formats


def test_a_checkpoint_of_the_older_format_gives_the_same_state(tmp_path):
    torch.save(old_content(7), tmp_path / LATEST)
    state, tensors, line = load_checkpoint(tmp_path / LATEST)
    expected, expected_tensors = TrainState.from_dict(content(7))
    expected.grad_norms = []
    assert (state, line) == (expected, None) and same(tensors, expected_tensors)


def test_the_first_checkpoints_lack_three_keys(tmp_path):
    older = old_content(7)
    for name in ("broken", "data", "weights"):
        del older[name]
    torch.save(older, tmp_path / LATEST)
    state = load_checkpoint(tmp_path / LATEST)[0]
    assert (state.unreadable, state.data_digest, state.weights) == ([], None, None)


@pytest.mark.parametrize(
    ("top1", "best"), [([], 0), ([3], 1), ([3, 5, 4], 2), ([3, 5, 5], 2), ([0, 0], 1)]
)
def test_an_older_checkpoint_names_its_best_epoch_by_its_rows(tmp_path, top1, best):
    rows = [{"epoch": i + 1, "val_top1": value} for i, value in enumerate(top1)]
    torch.save({**old_content(7), "rows": rows}, tmp_path / LATEST)
    state = load_checkpoint(tmp_path / LATEST)[0]
    assert (state.best_epoch, state.epoch) == (best, len(top1))


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
    write(tmp_path / name, {**content(1), "config": Code(target)})
    with pytest.raises(UserError, match=name) as caught:
        load_checkpoint(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert not target.exists()


def test_the_predecessor_does_not_replace_a_latest_that_carries_code(saved):
    torch.save({**content(1), "config": Code(saved / "written")}, saved / LATEST)
    with pytest.raises(UserError, match="can run code"):
        load_checkpoint(saved / LATEST)
    assert not (saved / "written").exists()


@pytest.mark.parametrize(
    "value",
    [
        {"conv1.weight": torch.ones(3)},
        [1, 2],
        torch.ones(2),
        {k: v for k, v in content(1).items() if k != "optimizer"},
        {k: v for k, v in content(1).items() if k != "seconds"},
        {k: v for k, v in old_content(1).items() if k != "clock"},
        {**old_content(1), "clock": []},
    ],
)
def test_weights_are_not_a_checkpoint(tmp_path, value):
    torch.save(value, tmp_path / "w.pt")
    with pytest.raises(UserError, match="a weights file cannot be resumed"):
        load_checkpoint(tmp_path / "w.pt")


@pytest.mark.parametrize("pickled", [b"", b".", b"0.", b"}(u.", b"K\x01K\x02s.", b"hello"])
def test_a_pickle_that_makes_no_sense_is_one_line_too(tmp_path, pickled):
    """A well-formed archive around it, with right checksums."""
    torch.save(content(1), tmp_path / "good.pt")
    with (
        zipfile.ZipFile(tmp_path / "good.pt") as old,
        zipfile.ZipFile(tmp_path / "bad.pt", "w") as new,
    ):
        for info in old.infolist():
            data = pickled if info.filename.endswith("data.pkl") else old.read(info)
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
        (content(1), None),
    ],
)
def test_find_nonfinite_names_the_first_tensor(value, expected):
    assert find_nonfinite(value) == expected
