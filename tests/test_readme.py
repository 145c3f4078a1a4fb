"""What the README promises on a command line is what the scripts take."""

import re
import shlex
from pathlib import Path

import pytest

import pretrain_imagenet
import run_all
import train

ROOT = Path(__file__).resolve().parent.parent
READMES = ("README.md", "README.zh-CN.md")
PARSE = {
    "pretrain_imagenet.py": pretrain_imagenet.parse_args,
    "run_all.py": run_all.parse_args,
    "train.py": lambda argv: train.make_parser().parse_args(argv),
}
# The commands of the guides that users were given, beyond those that the README has too.
GUIDES = """
python pretrain_imagenet.py --data_dir /path/to/imagenet --batch_size 256 --epochs 600 --lr 0.1 --checkpoint_dir checkpoints
torchrun --nproc_per_node=8 pretrain_imagenet.py --data_dir /path/to/imagenet --epochs 600 --batch_size 128 --lr 0.1 --checkpoint_dir checkpoints
torchrun --nproc_per_node=4 pretrain_imagenet.py --data_dir /path/to/imagenet --epochs 300 --checkpoint_dir checkpoints
python pretrain_imagenet.py --batch_size 128
python pretrain_imagenet.py --amp --workers 8
python train.py --data_dir data/dtd --dataset dtd --fold 1 --seed 42 --model twistnet18 --epochs 10 --run_dir runs/test
""".strip().splitlines()  # noqa: E501


def text_of(readme):
    return (ROOT / readme).read_text(encoding="utf-8")


def blocks(readme, language="bash"):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text_of(readme), re.M | re.S)
    return [block for name, block in found if name == language]


def tool_commands(readme):
    """Every `python -m tools.…` with its arguments, in the text as well as in the blocks."""
    return [
        " ".join(command.split())
        for command in re.findall(r"python -m tools\.[^`]+", text_of(readme))
    ]


def script_lines(readme):
    return [
        line
        for block in blocks(readme)
        for line in block.splitlines()
        if any(script in line for script in PARSE)
    ]


def test_the_first_two_blocks_are_one_command_line_each():
    first, second = blocks("README.md")[:2]
    assert first.count("\n") == second.count("\n") == 1
    assert "tools.demo" in first and "pytest" in second


@pytest.mark.parametrize(
    "line", [*(line for readme in READMES for line in script_lines(readme)), *GUIDES]
)
def test_every_command_is_taken_as_written(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)
    script = next(word for word in words if word in PARSE)
    arguments = words[words.index(script) + 1 :]
    if "--resume" in arguments:  # of a run that is not there
        with pytest.raises(ValueError, match="checkpoints/latest.pt: no such file"):
            PARSE[script](arguments)
    else:
        PARSE[script](arguments)
    assert (ROOT / script).is_file()


def test_every_tool_and_file_that_is_named_is_there():
    for tool in re.findall(r"python -m (tools\.[a-z_]+)", text_of("README.md")):
        place = ROOT / tool.replace(".", "/")
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file()


def test_both_languages_have_the_same_commands():
    english, chinese = READMES
    assert blocks(english) == blocks(chinese)
    assert blocks(english, "")[1:] == blocks(chinese, "")[1:]  # all but the picture
    assert tool_commands(english) == tool_commands(chinese)
    assert f"({chinese})" in text_of(english) and f"({english})" in text_of(chinese)
