"""Make an ImageNet tree, OUT/train/<wnid> and OUT/val/<wnid>, from what you have downloaded.

  python -m tools.prepare_imagenet --source DOWNLOADS --out /path/to/imagenet
  python -m tools.prepare_imagenet --out /path/to/imagenet --verify

The contents of DOWNLOADS decide how it is read, train and val independently of each other:

  official archives   ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar; preferred to folders
  half unpacked       train/ with class tars (n01440764.tar); a tar is preferred to its folder
  Kaggle              ILSVRC/Data/CLS-LOC/{train,val}
  Tiny-ImageNet       train/<wnid>/images, val/images
  a tree              train/<wnid>, val/<wnid>, to link or to take a --subset of

Validation images that are not in class folders need one list of their classes, in DOWNLOADS or its
val folder: valprep.sh, LOC_val_solution.csv, val_annotations.txt, the devkit
(ILSVRC2012_devkit_t12.tar.gz or unpacked; needs scipy), or
ILSVRC2012_validation_ground_truth.txt with a list of synsets in the devkit's order.

DOWNLOADS is never changed. Archives are extracted; folders are hard-linked, or symbolically
linked where OUT is on another file system. A class folder appears in OUT only when it is complete,
so after any interruption the same command continues. Exit codes: 0 done, 1 --verify found damage,
2 bad input, 3 another process is preparing OUT.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from common.cli import Parser, at_least, run
from common.errors import UserError
from data.imagenet import load_imagenet
from tools.prepare_imagenet.tree import prepare
from tools.prepare_imagenet.verify import describe_missing, verify


def parse_args(argv: Sequence[str] | None = None):
    parser = Parser(prog="python -m tools.prepare_imagenet", description=__doc__)
    parser.add_argument("--source", type=Path, metavar="DIR", help="folder with the downloads")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder to make the tree in, later the --data_dir of pretrain_imagenet.py",
    )
    parser.add_argument(
        "--subset",
        metavar="N|FILE",
        help="only some classes: N of them (always the same), or those listed in FILE, one wnid "
        "per line (the list of ImageNet-100, for example)",
    )
    parser.add_argument("--copy", action="store_true", help="copy files instead of linking them")
    parser.add_argument(
        "--no_checksum",
        action="store_true",
        help="do not compare the MD5 of official archives with the published one "
        "(saves reading them once more when resuming)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="count the images in OUT and decode each of them; alone, or after preparing",
    )
    parser.add_argument(
        "--workers",
        type=at_least(1),
        default=min(os.cpu_count() or 1, 16),
        metavar="N",
        help="number of processes",
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
            "a worker process was killed (out of memory?): run the same command again, with fewer "
            "--workers if it happens again"
        ) from None
    except OSError as error:
        raise UserError(f"{error}: correct this and run the same command again") from error

    for problem in describe_missing(train, val, classes):
        print(f"warning: {problem}", file=sys.stderr)
    print(
        f"{len(train):,} train and {len(val):,} val images in {len(classes):,} classes; next: "
        f"python pretrain_imagenet.py --data_dir {shlex.quote(str(args.out))}"
    )


if __name__ == "__main__":
    run(main)
