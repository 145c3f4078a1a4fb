"""common/cli.py: spelling of flags, one-line errors, exit codes, outputs that close."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common import cli
from common.cli import Parser, add_amp_flags, at_least, run
from common.errors import Busy, Diverged, Preempted, UserError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def parser():
    parser = Parser(prog="script.py", description="What it does.\n\n  python script.py --batch 1")
    parser.add_argument("--data_dir", type=Path, default=Path("data/x"), help="where")
    parser.add_argument("--batch_size", type=at_least(1), default=32, help="images")
    parser.add_argument("--lr", type=at_least(0, float), default=0.1, help="rate")
    parser.add_argument("--fold", type=at_least(1), default=1, help="which split")
    parser.add_argument("--gap", type=at_least(0), default=0, help="none")
    parser.add_argument("--resume", type=Path, help="checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="start again")
    add_amp_flags(parser.add_argument_group("speed"))
    return parser


@pytest.mark.parametrize(
    "words",
    [
        ["--data_dir", "a-b_c", "--batch_size", "8"],
        ["--data-dir", "a-b_c", "--batch-size", "8"],
        ["--data-dir=a-b_c", "--batch_size=8"],
        ["--data_dir=a-b_c", "--batch-size=8"],
    ],
)
def test_both_spellings_and_values_untouched(parser, words):
    args = parser.parse_args(words)
    assert (args.data_dir, args.batch_size, args.lr) == (Path("a-b_c"), 8, 0.1)


def test_the_command_line_of_the_process_is_the_default(parser, monkeypatch):
    monkeypatch.setattr("sys.argv", ["script.py", "--no-amp", "--batch-size", "3"])
    args = parser.parse_args()
    assert (args.amp, args.batch_size) == (False, 3)
    assert parser.given == {"amp", "batch_size"}


def test_words_after_two_dashes_are_not_flags(parser):
    parser.add_argument("files", nargs="*")
    args = parser.parse_args(["--batch-size", "3", "--", "--a-b.jpg", "--lr"])
    assert args.files == ["--a-b.jpg", "--lr"] and parser.given == {"batch_size"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [([], None), (["--amp"], True), (["--no_amp"], False), (["--no-amp"], False)],
)
def test_amp_is_requested_or_refused_or_neither(parser, words, expected):
    assert parser.parse_args(words).amp is expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], set()),
        (["--batch-size", "32"], {"batch_size"}),  # its default, but given
        (["--overwrite", "--no-amp"], {"overwrite", "amp"}),
        (["--data_dir=x", "--resume", "y"], {"data_dir", "resume"}),
    ],
)
def test_given_names_the_flags_of_the_command_line(parser, words, expected):
    parser.parse_args(words)
    assert parser.given == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch_size", "0"], "--batch_size: '0' is not an integer of at least 1"),
        (["--batch-size", "1.5"], "'1.5' is not an integer of at least 1"),
        (["--lr", "nan"], "'nan' is not a number of at least 0"),
        (["--lr", "inf"], "'inf' is too large: it must be below 2^63"),
        (["--data_dir", ""], "an argument is empty: is a shell variable unset?"),
        (["--data_dir="], "--data_dir= is empty"),
        (["--lr", "-1"], "'-1' is not a number"),
        (["--lr", "fast"], "'fast' is not a number"),
        (["--batch", "4"], "unrecognized arguments: --batch 4"),  # no guessing by abbreviation
        (["--lr"], "expected one argument"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_bad_flags_are_usage_errors_of_one_line(parser, words, message):
    with pytest.raises(UserError) as caught:
        parser.parse_args(words)
    assert message in str(caught.value) and "script.py --help" in str(caught.value)
    assert "\n" not in str(caught.value) and isinstance(caught.value, UserError)


def test_numbers_are_of_their_kind():
    assert at_least(1)("7") == 7 and isinstance(at_least(1)("7"), int)
    assert at_least(0, float)("1e-4") == 1e-4 and at_least(0, float)("0") == 0


def test_help_shows_every_default_and_keeps_the_description(parser, capsys):
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert "\n  python script.py --batch 1\n" in text
    for shown in ("(default: data/x)", "(default: 32)", "(default: 0.1)"):
        assert shown in text
    lines = {line.split()[0]: line for line in text.splitlines() if line.startswith("  --")}
    assert "(default: 1)" in lines["--fold"]
    assert "(default: 0)" in lines["--gap"]
    for silent in ("--resume", "--overwrite", "--amp"):
        assert "default:" not in lines[silent]


def caused_by(number: int) -> UserError:
    error = UserError("it cannot be read")
    error.__cause__ = OSError(number, os.strerror(number))
    return error


class OwnError(UserError):
    pass


def outcome(error, capsys, **options):
    def main():
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as caught:
        run(main, **options)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == (error is not None)
    return caught.value.code, err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (None, 0, ""),
        (UserError("no such\n file"), 2, "error: no such file\n"),
        (UserError("bad flag"), 2, "error: bad flag\n"),
        (caused_by(errno.ENOSPC), 2, "error: it cannot be read\n"),
        (caused_by(errno.ESTALE), 1, "error: it cannot be read\n"),  # a restart may help
        (OwnError("bad data"), 2, "error: bad data\n"),
        (Diverged("the loss is not finite"), 1, "error: the loss is not finite\n"),
        (Busy("it is in use"), 3, "error: it is in use\n"),
        (Preempted("preempted, resume"), 75, "preempted, resume\n"),
        (
            OSError(28, "No space left on device", "results.json"),
            1,
            "error: results.json: No space left on device\n",
        ),
        (PermissionError(13, "Permission denied", "a"), 2, "error: a: Permission denied\n"),
        (OSError(36, "File name too long", "a"), 2, "error: a: File name too long\n"),
        (FileNotFoundError(2, "No such file", "a"), 1, "error: a: No such file\n"),
        (
            OSError(
                "Caught OSError in DataLoader worker process 0.\nOriginal Traceback …\nOSError: x"
            ),
            1,
            "error: OSError: x\n",
        ),
        (
            ValueError("Expected more than 1 value per channel when training, got [1, 512, 1, 1]"),
            2,
            "error: BatchNorm needs more than one value per channel: use a larger --batch_size or "
            "--img_size, or add images\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_exit_codes_and_their_one_line(capsys, error, code, line):
    assert outcome(error, capsys) == (code, line)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has"),
        (torch.AcceleratorError, "CUDA error: out of memory"),
        (RuntimeError, "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        (RuntimeError, "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling x"),
        (RuntimeError, "NCCL error in: x.cpp:1, unhandled cuda error, 'out of memory'"),
        (RuntimeError, "[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate "
         "memory: you tried to allocate 99 bytes. Error code 12 (Cannot allocate memory)"),
        (MemoryError, ""),
    ],
)  # fmt: skip
def test_out_of_memory_is_one_line_that_names_the_flag(capsys, kind, text):
    error = kind(f"{text}\nmore\nlines" if text else "")
    code, line = outcome(error, capsys)
    assert code == 1 and line.startswith("error: out of memory: use a smaller --batch_size or")
    assert text in line and "more" not in line


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)",
         "--shm-size or --ipc=host, or use fewer --workers"),
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
         "dataloader's workers are out of shared memory. Please try to raise your limit.",
         "--shm-size"),
        ("unable to open shared memory object </torch_1> in read-write mode: Too many open files",
         "ulimit -n, or use fewer --workers"),
        ("received 0 items of ancdata", "ulimit -n, or use fewer --workers"),
        ("Caught OSError in DataLoader worker process 1.\n[Errno 24] Too many open files: 'x'",
         "ulimit -n"),
        ("DataLoader worker (pid 7) is killed by signal: Killed.", "memory ran out: use"),
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", "memory ran out: use"),
    ],
)  # fmt: skip
def test_a_limit_of_the_machine_is_one_line_that_names_it_and_the_flag(capsys, text, flags):
    for kind in (RuntimeError, OSError):
        code, line = outcome(kind(text), capsys)
        assert code == 1 and line.startswith("error: ") and flags in line


@pytest.mark.parametrize(
    "text",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:1",
        "NCCL communicator was aborted on rank 0.",
    ],
)
def test_a_lost_rank_is_one_line(capsys, text):
    code, line = outcome(RuntimeError(text), capsys)
    assert (
        code == 1
        and line.startswith("error: the connection to another rank is lost")
        and text in line
    )


@pytest.mark.parametrize(
    "error", [ZeroDivisionError(), RuntimeError("size mismatch"), ValueError()]
)
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        run(lambda: (_ for _ in ()).throw(error))


@pytest.mark.parametrize(
    ("error", "max_restarts", "told"),
    [
        (UserError("x"), "3", True),
        (Diverged("x"), "3", True),
        (RuntimeError("CUDA out of memory"), "3", True),
        (UserError("x"), "0", False),
        (UserError("x"), None, False),
        (Busy("x"), "3", False),  # the other process may be about to end
        (Preempted("x"), "3", False),
        (OSError(5, "Input/output error"), "3", False),  # may work the next time
    ],
)
def test_torchrun_is_told_to_stop_where_a_restart_would_fail_again(
    capsys, monkeypatch, error, max_restarts, told
):
    signals = []
    monkeypatch.setattr(cli.os, "kill", lambda *args: signals.append(args))
    if max_restarts:
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", max_restarts)
    outcome(error, capsys)
    assert signals == []  # a tool that a rank starts must not end torchrun
    outcome(error, capsys, ends_torchrun=True)
    assert signals == ([(os.getppid(), signal.SIGTERM)] if told else [])


def test_torchrun_does_not_restart_a_run_that_is_out_of_memory(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from common.cli import run\n"
        "def main():\n"
        "    with open('starts', 'a') as file:\n"
        "        file.write('x')\n"
        "    raise RuntimeError('CUDA error: out of memory')\n"
        "run(main, ends_torchrun=True)\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max_restarts=3"]
    done = subprocess.run(
        [*torchrun, "--monitor_interval=0.1", str(script)], capture_output=True, text=True
    )
    assert done.returncode != 0 and Path("starts").read_text() == "x"
    assert "error: out of memory: use a smaller --batch_size" in done.stderr


def test_other_ranks_wait_before_they_speak(capsys, monkeypatch):
    slept = []
    monkeypatch.setattr(cli.time, "sleep", slept.append)
    monkeypatch.setenv("RANK", "0")
    outcome(UserError("x"), capsys)
    assert slept == []
    monkeypatch.setenv("RANK", "3")
    assert outcome(UserError("x"), capsys) == (2, "rank 3: error: x\n")
    assert len(slept) == 1


def test_a_reader_that_leaves_causes_no_traceback():
    code = (
        "from common.cli import run\n"
        "run(lambda: [print('x' * 1000, flush=True) for _ in range(1000)])"
    )
    done = subprocess.run(
        f'{sys.executable} -c "{code}" | head -n 1',
        shell=True,
        text=True,
        cwd=ROOT,
        capture_output=True,
    )
    assert done.stdout == "x" * 1000 + "\n" and done.stderr == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_text_that_the_terminal_cannot_show_does_not_end_a_program(encoding):
    code = "from common.cli import run\nrun(lambda: print('2 × 4 images → μ'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    assert done.returncode == 0 and done.stderr == b""
    assert done.stdout.decode(encoding).startswith("2 ") and b"images" in done.stdout


def closed_pipe():
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


def closed_terminal():
    master, terminal = os.openpty()
    os.close(master)
    return os.fdopen(terminal, "w")


@pytest.mark.parametrize("open_closed", [closed_pipe, closed_terminal])
def test_a_closed_output_does_not_end_a_program(monkeypatch, open_closed):
    stream = open_closed()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    cli.ignore_closed_output()
    cli.ignore_closed_output()  # by run and by StopRequest
    for _ in range(3):
        print("x" * 100_000, flush=True)
        print("y", file=sys.stderr)
    assert sys.stdout.isatty() is False  # the rest of a stream is there
    stream.close()


def test_a_full_disk_behind_the_output_does_not_end_a_run(monkeypatch):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full, which Linux has")
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        cli.ignore_closed_output()
        print("x" * 100_000, flush=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def test_an_interrupted_program_whose_output_is_closed_still_exits_with_130():
    """Ctrl-C of `... 2>&1 | tee log` ends the tee as well."""
    code = (
        "import os\nfrom common.cli import run\n"
        "def main():\n"
        "    print('x', end='')\n"
        "    raise KeyboardInterrupt\n"
        "run(main)"
    )
    reading, writing = os.pipe()
    os.close(reading)
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=writing, stderr=writing, env=buffered
    )
    os.close(writing)
    assert done.returncode == 130
