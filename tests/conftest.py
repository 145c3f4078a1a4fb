"""What every test has: a folder of its own to work in, its own signal handlers, one thread.

The tests' networks are small, and several tests run at a time.
"""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

from common.processes import STOP_SIGNALS

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", f"{tmp_path}-cache")
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    shutil.rmtree(f"{tmp_path}-cache", ignore_errors=True)  # pytest removes tmp_path alone


@pytest.fixture
def unprivileged():
    """A context in which permissions bind: root, whom they do not, becomes another user."""

    @contextlib.contextmanager
    def become_another_user():
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)
        try:
            yield
        finally:
            if is_root:
                os.seteuid(0)

    return become_another_user


@pytest.fixture
def locked_by_another():
    """A context in which another process holds the lock of a folder."""
    script = (
        "import sys; from pathlib import Path; from common.files import lock_folder\n"
        "with lock_folder(Path(sys.argv[1])):\n    print(flush=True); input()"
    )

    @contextlib.contextmanager
    def hold(folder):
        command = [sys.executable, "-c", script, os.path.abspath(folder)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, cwd=ROOT, **pipes) as other:  # the end closes its input
            assert other.stdout.readline()
            yield

    return hold


@pytest.fixture
def full_disk():
    """A context without room: no file grows beyond 1 KB (Python ignores SIGXFSZ: OSError)."""

    @contextlib.contextmanager
    def limit_files():
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit_files


@pytest.fixture
def trainers(monkeypatch):
    """The trainers that are made during a test, in their order."""
    from training.engine import Trainer

    made, init = [], Trainer.__post_init__
    monkeypatch.setattr(Trainer, "__post_init__", lambda self: made.append(self) or init(self))
    return made


@pytest.fixture
def refuse_precision(monkeypatch):
    """Call it, and from then on both scripts refuse to train in the precision of any run."""
    import pretrain_imagenet
    import train
    from common.errors import UserError

    def refuse(*_):
        raise UserError("the run is in bf16")

    def start():
        for script in (pretrain_imagenet, train):
            monkeypatch.setattr(script, "check_precision", refuse)

    return start


@pytest.fixture
def failing(monkeypatch):
    """failing(errno.EIO, 2, "1.jpg"): the next two attempts to read such a file fail."""
    from data import decoding

    read, left = decoding._read_once, []

    def fail(path):
        if left and fnmatch(path.name, left[-1][1]):
            number, _ = left.pop()
            raise OSError(number, os.strerror(number), str(path))
        return read(path)

    monkeypatch.setattr(decoding, "_read_once", fail)
    monkeypatch.setattr(decoding, "RETRY_AFTER", (0, 0))
    return lambda number, times, name: left.extend([(number, name)] * times)


@pytest.fixture
def tiny_network(monkeypatch):
    """Both scripts train a network of a few hundred parameters, whatever --model says."""
    from tiny_network import build_model

    import pretrain_imagenet
    import train

    for script in (pretrain_imagenet, train):
        monkeypatch.setattr(script, "build_model", build_model)


@pytest.fixture
def stop_after(monkeypatch):
    """stop_after(step=3) or stop_after(validation=1): signal a run in this process at that moment.

    The step is the global one, from 0; validations are counted from 1. A later call replaces the
    moment, and stop_after() signals no more.
    """
    from training.engine import Evaluator, Trainer

    train, validate = Trainer.step, Evaluator.run
    moment, validations = {}, []

    def train_and_signal(trainer, batches, *, step, lr):
        train(trainer, batches, step=step, lr=lr)
        if step == moment.get("step"):
            os.kill(os.getpid(), signal.SIGTERM)

    def validate_and_signal(evaluator, model):
        validations.append(1)
        if len(validations) == moment.get("validation"):
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(evaluator, model)

    def set_moment(**named):
        moment.clear()
        moment.update(named)
        validations.clear()

    monkeypatch.setattr(Trainer, "step", train_and_signal)
    monkeypatch.setattr(Evaluator, "run", validate_and_signal)
    return set_moment


@pytest.fixture
def write_in_old_format():
    """Rewrite a checkpoint as it was before TrainState, clip_norm and identifiers in recipes."""
    import torch

    old_words = {
        "cross_entropy": "cross-entropy",
        "binary_cross_entropy": "binary cross-entropy",
        "cosine": "cosine over steps, after a warm-up",
        "timm_cosine": "timm's cosine",
    }

    def write(path):
        new = torch.load(path, weights_only=True)
        config = {
            name: old_words.get(value, value) if name in ("loss", "schedule") else value
            for name, value in new["config"].items()
            if name != "clip_norm"
        }
        kept = ("model", "optimizer", "scaler", "step", "classes")
        torch.save(
            {
                **{name: new[name] for name in kept},
                "config": config,
                "rows": new["history"],
                "sums": new["loss_sums"],
                "clock": [new["seconds"], new["data_wait"]],
                "broken": new["unreadable"],
                "images": new["num_images"],
                "data": new["data_digest"],
            },
            path,
        )

    return write


@pytest.fixture
def eager_compiler(monkeypatch):
    """torch.compile with a backend that computes as the network itself does."""
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda module, **options: compiled(module, backend="eager", **options),
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch._dynamo.utils.counters
