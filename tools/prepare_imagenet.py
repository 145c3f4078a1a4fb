"""Make an ImageNet tree, OUT/train/<wnid> and OUT/val/<wnid>, from what you have downloaded.

    python -m tools.prepare_imagenet --source DOWNLOADS --out /path/to/imagenet
    python -m tools.prepare_imagenet --out /path/to/imagenet --verify

DOWNLOADS is recognised by what lies in it, train and val each on their own:

  official archives   ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar; they win over folders
  half unpacked       train/ with class tars (n01440764.tar); a tar wins over its folder
  Kaggle              ILSVRC/Data/CLS-LOC/{train,val}
  Tiny-ImageNet       train/<wnid>/images, val/images
  a tree              train/<wnid>, val/<wnid>, to link or to take a --subset of

Validation images that lie flat need one list of their classes, in DOWNLOADS or its val folder:
valprep.sh, LOC_val_solution.csv, val_annotations.txt, the devkit (ILSVRC2012_devkit_t12.tar.gz
or unpacked; needs scipy), or ILSVRC2012_validation_ground_truth.txt with a list of synsets in
the devkit's order.

DOWNLOADS is never changed. Archives are extracted; folders are hard-linked, or symbolically
linked where OUT is on another filesystem. A class appears in OUT only when it is whole, so after
any interruption the same command goes on. Exit codes: 0 done, 1 --verify found damage, 2 bad input.
"""

import fcntl
import hashlib
import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import connection, parent_process
from pathlib import Path

import numpy as np
from torchvision.datasets.imagenet import ARCHIVE_META
from tqdm import tqdm

from common.cli import Parser, at_least, run
from common.errors import UserError
from data.ilsvrc import check_same_classes, choose_subset, find_classes, shortfall
from data.ilsvrc_classes import ClassSource, is_made, list_images, make_class
from data.imagenet import load_imagenet
from data.images import ImageFiles

SPLITS = ("train", "val")
CHUNK = 256  # images that one process decodes at a time
READ = 1 << 22  # bytes a read while a checksum is taken


def parse_args(argv: Sequence[str] | None = None):
    parser = Parser(description=__doc__)
    parser.add_argument("--source", type=Path, metavar="DIR", help="folder with the downloads")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="where the tree is made; the later --data_dir",
    )
    parser.add_argument(
        "--subset",
        metavar="N|FILE",
        help="only these classes: N, always the same, or those that FILE names, a"
        " wnid a line (ImageNet-100's list, say)",
    )
    parser.add_argument("--copy", action="store_true", help="copy files instead of linking them")
    parser.add_argument(
        "--no_checksum",
        action="store_true",
        help="take archives of the official names without comparing their MD5 "
        "(saves reading them once more when resuming)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="count OUT's images and decode each; alone, or after preparing",
    )
    parser.add_argument(
        "--workers",
        type=at_least(1),
        default=min(os.cpu_count() or 1, 16),
        metavar="N",
        help="processes",
    )
    args = parser.parse_args(argv)
    if args.source is None and not args.verify:
        parser.error("--source is needed, or --verify to check an existing --out")
    if args.source is None and (args.subset or args.copy or args.no_checksum):
        parser.error("--subset, --copy and --no_checksum need --source")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        if args.source is not None:
            prepare(
                args.source,
                args.out,
                subset=args.subset,
                copy=args.copy,
                checksum=not args.no_checksum,
                workers=args.workers,
            )
        if args.verify and not verify(args.out, args.workers):
            sys.exit(1)
        train, val, classes = load_imagenet(args.out)
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed (out of memory?): run the same command "
            "again, perhaps with fewer --workers"
        ) from None
    except OSError as error:
        raise UserError(f"{error}: mend it and run the same command again") from error
    for problem in shortfall(train, val, classes):
        print(f"warning: {problem}", file=sys.stderr)
    print(
        f"{len(train):,} train and {len(val):,} val images in {len(classes):,} classes; next: "
        f"python pretrain_imagenet.py --data_dir {shlex.quote(str(args.out))}"
    )


def prepare(
    source: Path, out: Path, *, subset: str | None, copy: bool, checksum: bool, workers: int
) -> None:
    """Make the tree `out` from what `source` holds; goes on where an earlier call was stopped.

    Raises UserError before it writes any image where the source or what lies in `out` is wrong;
    classes finished before a later error are kept.
    """
    classes, archives = find_classes(source)
    if subset is not None:
        classes = choose_subset(classes, subset)
    check_same_classes(classes)
    check_apart(classes, out)
    with locked(out):
        todo = unmade(classes, out, workers)
        remove_unfinished(out)
        check_space(todo, out, copy)
        for archive in archives if todo and checksum else ():
            check_md5(archive)
        for_each(partial(make_class, out=out, copy=copy), todo, workers, "preparing")
    print(f"{len(todo)} class folders made, {len(classes) - len(todo)} were there already")
    if any(
        os.path.islink(out / c.split / c.wnid / name)
        for c in classes[:1] + classes[-1:]
        for name in list_images(out / c.split / c.wnid)[:1]
    ):
        print(f"note: {out} links to files in {source}: keep them, or prepare with --copy")


def verify(out: Path, workers: int) -> bool:
    """Print every image of the tree that does not decode and whatever else is wrong with it.

    -> whether all is well. Raises UserError when `out` is not there.
    """
    if not out.is_dir():
        raise UserError(f"--out {out} is not there: prepare it with --source")
    problems = [f"{part} is unfinished: run with --source again" for part in unfinished(out)]
    try:
        train, val, classes = load_imagenet(out)
    except UserError as error:
        problems.append(f"{error}; images not opened")
    else:
        problems += shortfall(train, val, classes)
        chunks = [
            ImageFiles(images.root, files, np.zeros(len(files), dtype=np.int64))
            for images in (train, val)
            for files in np.array_split(images.files, -(-len(images) // CHUNK))
        ]
        for found in for_each(unreadable, chunks, workers, "decoding", unit="image", size=len):
            problems += found
    print("\n".join(f"broken: {problem}" for problem in problems) or f"{out}: nothing is broken")
    return not problems


def unreadable(images: ImageFiles) -> list[str]:
    """What read_rgb, which training uses too, says of the images that it cannot decode."""
    problems = []
    for index in range(len(images)):
        try:
            images.read(index)
        except OSError as error:
            problems.append(str(error))
    return problems


def check_apart(classes: list[ClassSource], out: Path) -> None:
    """Raise UserError if making `out` would write into the folders that are read."""
    for source in classes:
        target, origin = (out / source.split).resolve(), source.path.resolve()
        if origin.is_relative_to(target) or target.is_relative_to(origin):
            raise UserError(
                f"--out {out} would change the downloads in {source.path}: choose "
                "another folder (files are linked, not copied)"
            )


def unmade(classes: list[ClassSource], out: Path, workers: int) -> list[ClassSource]:
    """The classes that `out` does not hold yet. Raises UserError for folders it should not hold.

    Folders there are compared with the source file by file, by size: a tar that was interrupted
    or a power cut leave folders that look finished.
    """
    wanted = {out / c.split / c.wnid: c for c in classes}
    there = [
        p
        for split in SPLITS
        for p in sorted((out / split).glob("[!.]*"))
        if p.is_dir() and any(p.iterdir())
    ]
    foreign = [str(path) for path in there if path not in wanted]
    if foreign:
        raise UserError(
            f"{foreign[0]} ({len(foreign)} such) is not one of the classes to prepare: "
            "choose an empty --out"
        )
    same = for_each(partial(is_made, out=out), [wanted[p] for p in there], workers, "comparing")
    differing = [str(path) for path, is_same in zip(there, same, strict=True) if not is_same]
    if differing:
        raise UserError(
            "other images than the source's, or not all of them, are in "
            f"{', '.join(differing)}: remove these folders and run again"
        )
    return [wanted[path] for path in sorted(wanted.keys() - set(there))]


def unfinished(out: Path) -> list[Path]:
    return [part for split in SPLITS for part in sorted((out / split).glob(".n*.part"))]


def remove_unfinished(out: Path) -> None:
    for part in unfinished(out):
        shutil.rmtree(part)


def check_space(todo: list[ClassSource], out: Path, copy: bool) -> None:
    needed = sum(source.bytes_to_write(copy) for source in todo)
    needed += needed // 50  # the last block of a file is half empty
    free = shutil.disk_usage(out).free
    if needed > free:
        raise UserError(
            f"--out {out} needs {needed / 1e9:.1f} GB, its disk has "
            f"{free / 1e9:.1f} GB free: choose another disk"
        )


def check_md5(archive: Path) -> None:
    """Compare one of the official archives with the published MD5; UserError when it differs."""
    (expected,) = (md5 for name, md5 in ARCHIVE_META.values() if name == archive.name)
    digest = hashlib.md5(usedforsecurity=False)
    with (
        archive.open("rb") as file,
        tqdm(total=archive.stat().st_size, desc="checksum", unit="B", unit_scale=True) as bar,
    ):
        while block := file.read(READ):
            digest.update(block)
            bar.update(len(block))
    if digest.hexdigest() != expected:
        raise UserError(
            f"{archive} has MD5 {digest.hexdigest()}, the official one {expected}: "
            "download it again, or take it as it is with --no_checksum"
        )


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold `out` for this run: two of them would write the same class. Released however we end."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is preparing {out}: wait for it") from None
        except OSError:  # a filesystem without locks
            pass
        yield


def for_each(
    function: Callable,
    tasks: Sequence,
    workers: int,
    desc: str,
    *,
    unit: str = "class",
    size: Callable[[object], int] = lambda task: 1,
) -> list:
    """`function` of every task, in order, by several processes; a task counts `size` in the bar."""
    if not tasks:
        return []
    results = []
    with (
        ProcessPoolExecutor(min(workers, len(tasks)), initializer=_follow_parent) as pool,
        tqdm(total=sum(map(size, tasks)), desc=desc, unit=unit) as bar,
    ):
        try:
            for task, result in zip(tasks, pool.map(function, tasks), strict=True):
                results.append(result)
                bar.update(size(task))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results


def _follow_parent() -> None:
    # Ctrl-C is the parent's to handle. When the parent is killed, its workers must not go on
    # writing beside the run that takes its place.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait() -> None:
        connection.wait([parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    run(main)
