"""training/command_line.py: spellings, one-line errors, exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.cli import Parser, add_amp_flags, at_least, run
from common.errors import Diverged, Preempted, UserError
from training import command_line


@pytest.fixture
def parser():
    parser = Parser(prog="script.py", description="What it does.\n\n  python script.py --batch 1")
    parser.add_argument("--data_dir", type=Path, default=Path("data/x"), help="where")
    parser.add_argument("--batch_size", type=at_least(1), default=32, help="images")
    parser.add_argument("--lr", type=at_least(0, float), default=0.1, help="rate")
    parser.add_argument("--fold", type=at_least(1), default=1, help="which split")
    parser.add_argument("--gap", type=at_least(0), default=0, help="none")
    parser.add_argument("--resume", type=Path, help="checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="anew")
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
    assert parser.given() == {"amp", "batch_size"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [([], None), (["--amp"], True), (["--no_amp"], False), (["--no-amp"], False)],
)
def test_amp_is_asked_for_or_refused_or_neither(parser, words, expected):
    assert parser.parse_args(words).amp is expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], set()),
        (["--batch-size", "32"], {"batch_size"}),  # its default, given all the same
        (["--overwrite", "--no-amp"], {"overwrite", "amp"}),
        (["--data_dir=x", "--resume", "y"], {"data_dir", "resume"}),
    ],
)
def test_given_names_what_the_command_line_says(parser, words, expected):
    assert parser.given(words) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch_size", "0"], "--batch_size: '0' is not an integer of at least 1"),
        (["--batch-size", "1.5"], "'1.5' is not an integer of at least 1"),
        (["--lr", "nan"], "'nan' is not a number of at least 0"),
        (["--lr", "inf"], "'inf' is not a number"),
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


class OwnError(ValueError):
    pass


def outcome(error, capsys, *usage_errors):
    def main():
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as caught:
        run(main, *usage_errors)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == (error is not None)
    return caught.value.code, err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (None, 0, ""),
        (UserError("no such\n file"), 2, "error: no such file\n"),
        (UserError("bad flag"), 2, "error: bad flag\n"),
        (OwnError("bad data"), 2, "error: bad data\n"),
        (Diverged("the loss is not finite"), 1, "error: the loss is not finite\n"),
        (Preempted("preempted, go on"), 75, "preempted, go on\n"),
        (
            OSError(28, "No space left on device", "results.json"),
            1,
            "error: [Errno 28] No space left on device: 'results.json'\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_exit_codes_and_their_one_line(capsys, error, code, line):
    assert outcome(error, capsys, OwnError) == (code, line)


def test_out_of_memory_names_the_flag(capsys):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore\nlines")
    code, line = outcome(error, capsys)
    assert code == 1 and "--batch_size" in line and "2 GiB" in line and "more" not in line


def test_a_bug_keeps_its_traceback():
    def main():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(main)
    with pytest.raises(OwnError):  # nor is an error of a package that the script did not name
        run(lambda: (_ for _ in ()).throw(OwnError()))


def test_other_ranks_wait_before_they_speak(capsys, monkeypatch):
    slept = []
    monkeypatch.setattr(command_line.time, "sleep", slept.append)
    monkeypatch.setenv("RANK", "0")
    outcome(UserError("x"), capsys)
    assert slept == []
    monkeypatch.setenv("RANK", "3")
    assert outcome(UserError("x"), capsys) == (2, "rank 3: error: x\n")
    assert len(slept) == 1


def test_a_reader_that_leaves_is_no_traceback():
    code = (
        "from common.cli import run\n"
        "run(lambda: [print('x' * 1000, flush=True) for _ in range(1000)])"
    )
    done = subprocess.run(
        f'{sys.executable} -c "{code}" | head -n 1',
        shell=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
    )
    assert done.stdout == "x" * 1000 + "\n" and done.stderr == ""
