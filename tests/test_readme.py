"""What the README promises exists: commands, flags, tools and files, the same in both languages."""

import re
import shlex
from pathlib import Path

import pytest

import pretrain_imagenet
import run_all
import train

ROOT = Path(__file__).resolve().parent.parent
READMES = ("README.md", "README.zh-CN.md")
PAGES = (*READMES, "data/README.md", *(f"docs/{page.name}" for page in ROOT.glob("docs/*.md")))
PARSE = {
    "pretrain_imagenet.py": pretrain_imagenet.parse_args,
    "run_all.py": run_all.parse_args,
    "train.py": lambda argv: train.make_parser().parse_args(argv),
}
PACKAGES = ("common", "data", "models", "sweeps", "training")
# Flags of other programs that the pages name.
FOREIGN = {
    *("--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--numa-binding"),
    *("--standalone", "--max_restarts", "--shutdown-timeout", "--signals-to-handle"),  # torchrun
    *("--shm-size", "--ipc"),  # docker
    *("--nodes", "--cpus-per-task", "--requeue", "--open-mode", "--signal"),  # sbatch
}
# The commands of the two guides that users were given, as they are written there.
GUIDES = r"""
python pretrain_imagenet.py \
    --data_dir /path/to/imagenet \
    --batch_size 256 \
    --epochs 600 \
    --lr 0.1 \
    --checkpoint_dir checkpoints
torchrun --nproc_per_node=4 pretrain_imagenet.py \
    --data_dir /path/to/imagenet \
    --batch_size 256 \
    --epochs 600 \
    --lr 0.1 \
    --checkpoint_dir checkpoints
torchrun --nproc_per_node=4 pretrain_imagenet.py \
    --data_dir /path/to/imagenet \
    --epochs 300 \
    --checkpoint_dir checkpoints
torchrun --nproc_per_node=8 pretrain_imagenet.py \
    --data_dir /path/to/imagenet \
    --epochs 600 \
    --batch_size 128 \
    --lr 0.1 \
    --checkpoint_dir checkpoints
python pretrain_imagenet.py \
    --data_dir /path/to/imagenet \
    --epochs 600 \
    --batch_size 256 \
    --checkpoint_dir checkpoints
python pretrain_imagenet.py \
    --data_dir /path/to/imagenet \
    --resume checkpoints/latest.pt
python pretrain_imagenet.py --batch_size 128
python pretrain_imagenet.py --amp --workers 8
python run_all.py --data_dir data/dtd --dataset dtd \
    --models resnet18,twistnet18 \
    --folds 1-10 --seeds 42,43,44 --epochs 100 \
    --run_dir runs/main
python run_all.py --data_dir data/dtd --dataset dtd \
    --models twistnet18,twistnet18_no_spiral,twistnet18_no_ais,twistnet18_first_order \
    --folds 1-3 --seeds 42,43,44 --epochs 100 \
    --run_dir runs/ablation
python train.py --data_dir data/dtd --dataset dtd --fold 1 --seed 42 \
    --model twistnet18 --epochs 100 --run_dir runs/test
python train.py --data_dir data/dtd --dataset dtd --fold 1 --seed 42 \
    --model twistnet18 --epochs 10 --run_dir runs/test
"""


def read_page(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def find_blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a language; "" is that of output and of files."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", read_page(page), re.M | re.S)
    return [block for name, block in found if name == language]


def join_lines(text: str) -> list[str]:
    """The command lines of a text, each in one line without its backslashes."""
    return [" ".join(line.split()) for line in text.replace("\\\n", " ").splitlines() if line]


def find_tool_commands(page: str) -> list[str]:
    """Every `python -m tools.…` with its arguments, in the text as well as in the blocks."""
    found = re.findall(r"python -m tools\.[a-z][^`&]*", read_page(page))
    return [" ".join(command.split()) for command in found]


def find_script_commands(page: str) -> list[str]:
    """Every command of a bash block that starts one of the three scripts."""
    lines = [line for block in find_blocks(page, "bash") for line in join_lines(block)]
    return [line for line in lines if any(script in line for script in PARSE)]


def find_tool_sources(tool: str) -> list[Path]:
    """The source of a tool, a module or a package, and of the parsers that all tools share."""
    place = ROOT / "tools" / tool
    own = [place.with_suffix(".py")] if place.with_suffix(".py").is_file() else place.glob("*.py")
    return [*own, ROOT / "common" / "cli.py"]


def names_flag(sources: list[Path], flag: str) -> bool:
    return any(f'"{flag}"' in source.read_text(encoding="utf-8") for source in sources)


def find_links(page: str) -> set[str]:
    """The targets of a page's links, without those inside of the page."""
    return {
        target for target in re.findall(r"\]\(([^)\s]+)\)", read_page(page)) if target[0] != "#"
    }


# ---------------------------------------------------------------- commands


@pytest.mark.parametrize("readme", READMES)
def test_the_first_two_blocks_are_one_command_line_each(readme):
    first, second = find_blocks(readme, "bash")[:2]
    assert first.count("\n") == second.count("\n") == 1
    assert "tools.demo" in first and "pytest" in second


@pytest.mark.parametrize("page", PAGES)
def test_no_line_of_a_command_is_longer_than_100_columns(page):
    for block in find_blocks(page, "bash"):
        for line in block.splitlines():
            assert len(line) <= 100, line


@pytest.mark.parametrize(
    "line",
    [*(line for readme in READMES for line in find_script_commands(readme)), *join_lines(GUIDES)],
)
def test_every_command_is_accepted_as_written(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)
    position = next(i for i, word in enumerate(words) if Path(word).name in PARSE)
    script, arguments = Path(words[position]).name, words[position + 1 :]
    if "--resume" in arguments:  # of a run that does not exist here
        with pytest.raises(ValueError, match="checkpoints/latest.pt: no such file"):
            PARSE[script](arguments)
    else:
        PARSE[script](arguments)


def test_the_readme_has_commands_of_all_three_scripts():
    commands = find_script_commands("README.md")
    assert all(any(script in command for command in commands) for script in PARSE)


@pytest.mark.parametrize("command", sorted({c for p in PAGES for c in find_tool_commands(p)}))
def test_every_tool_that_is_named_exists_and_has_the_flags(command):
    tool, *words = command.removeprefix("python -m tools.").split()
    tool = tool.rstrip(".,:;)")
    sources = find_tool_sources(tool)
    assert len(sources) > 1, f"tools.{tool} does not exist"
    for word in words:
        flag = word.partition("=")[0].rstrip(".,:;)")
        if flag.startswith("--"):
            assert names_flag(sources, flag), f"tools.{tool} has no {flag}"


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_that_is_named_exists(page):
    sources = [*ROOT.glob("*.py"), *ROOT.glob("common/*.py"), *ROOT.glob("tools/**/*.py")]
    sources.append(ROOT / "tests" / "torture.py")
    for flag in set(re.findall(r"(?<![\w-])--[a-z][\w-]*", read_page(page))) - FOREIGN:
        assert names_flag(sources, flag), f"{page}: {flag}"


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("page", PAGES)
def test_every_link_to_a_file_leads_to_one(page):
    for target in find_links(page):
        if not target.startswith("http"):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_every_link_inside_a_page_leads_to_a_heading(page):
    headings = re.findall(r"^#+ (.*)$", read_page(page), re.M)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)\s]+)\)", read_page(page))) <= anchors


@pytest.mark.parametrize("page", PAGES)
def test_every_source_file_that_is_named_exists(page):
    for name in re.findall(r"`((?:\w+/)+\w+\.py)`", read_page(page)):
        assert (ROOT / name).is_file(), f"{page}: {name}"


@pytest.mark.parametrize("readme", READMES)
def test_the_file_tree_names_every_module_and_nothing_else(readme):
    tree = next(block for block in find_blocks(readme, "text") if "train.py" in block)
    folder, named = "", set()
    for line in filter(str.strip, tree.splitlines()):
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
        named.add(name if name == folder or not line.startswith(" ") else folder + name)
    missing = {name for name in named if not (ROOT / name).exists()}
    assert not missing
    detailed = [
        folder
        for folder in PACKAGES
        if any(n.startswith(f"{folder}/") and n.endswith(".py") for n in named)
    ]
    modules = {
        path.relative_to(ROOT).as_posix()
        for folder in detailed
        for path in (ROOT / folder).glob("*.py")
        if path.name != "__init__.py"
    }
    assert modules <= named, modules - named


# ---------------------------------------------------------------- both languages


def test_both_languages_have_the_same_commands_outputs_and_files():
    english, chinese = READMES
    assert find_blocks(english, "bash") == find_blocks(chinese, "bash")
    assert find_blocks(english, "") == find_blocks(chinese, "")  # what commands print
    assert find_blocks(english, "bibtex") == find_blocks(chinese, "bibtex")
    assert find_tool_commands(english) == find_tool_commands(chinese)
    assert find_links(english) - set(READMES) == find_links(chinese) - set(READMES)
    assert f"({chinese})" in read_page(english) and f"({english})" in read_page(chinese)
