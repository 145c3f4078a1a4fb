"""tools/prepare_imagenet, on archives made here in the official formats."""

import csv
import errno
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets.imagenet as official
from PIL import Image

from common import files
from common.errors import Busy, UserError
from common.files import lock_folder
from data.imagenet import load_imagenet
from data.synthetic import write_imagenet_tree
from tools import pack
from tools.prepare_imagenet import classes
from tools.prepare_imagenet.__main__ import main, parse_args
from tools.prepare_imagenet.labels import read_val_labels
from tools.prepare_imagenet.verify import describe_missing

REPO = Path(__file__).resolve().parents[1]
# In the order of ILSVRC2012_ID, which is not the alphabet's.
WNIDS = ["n02119789", "n02100735", "n01440764"]
TRAIN_PER_CLASS = 3
TRUTH = [3, 1, 2, 1, 3, 2]  # ILSVRC2012_ID of validation images 1 … 6
VAL = {  # worked by hand from the two lines above
    "n01440764": ["ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000005.JPEG"],
    "n02100735": ["ILSVRC2012_val_00000003.JPEG", "ILSVRC2012_val_00000006.JPEG"],
    "n02119789": ["ILSVRC2012_val_00000002.JPEG", "ILSVRC2012_val_00000004.JPEG"],
}
TRAIN = {wnid: [f"{wnid}_{i}.JPEG" for i in range(TRAIN_PER_CLASS)] for wnid in WNIDS}
LABELS = {name: wnid for wnid, names in VAL.items() for name in names}


def image(name: str) -> bytes:
    """A small JPEG whose pixels depend on its name."""
    seed = int.from_bytes(hashlib.md5(name.encode()).digest()[:4], "big")
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def tar(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def class_tar(wnid: str) -> bytes:
    return tar({name: image(name) for name in TRAIN[wnid]})


def write(path: str, content: bytes | str) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content.encode() if isinstance(content, str) else content)
    return Path(path)


def write_train_tar() -> Path:
    return write("src/ILSVRC2012_img_train.tar", tar({f"{w}.tar": class_tar(w) for w in WNIDS}))


def write_val_tar() -> Path:
    # Not in the order of the names: labels go by name, not by position.
    return write(
        "src/ILSVRC2012_img_val.tar",
        tar({name: image(name) for name in sorted(LABELS, reverse=True)}),
    )


def write_train_folder(root: str, inner: str = "") -> None:
    for wnid, names in TRAIN.items():
        for name in names:
            write(f"{root}/{wnid}/{inner}/{name}", image(name))


def write_flat_val(root: str) -> None:
    for name in LABELS:
        write(f"{root}/{name}", image(name))


def write_valprep(path: str = "src/valprep.sh") -> None:
    write(
        path,
        "mkdir -p "
        + " ".join(VAL)
        + "\n"
        + "".join(f"mv {name} {wnid}/\n" for name, wnid in LABELS.items()),
    )


def devkit_files() -> dict[str, bytes]:
    """The devkit's two files that matter; meta.mat with two synsets above the classes."""
    savemat = pytest.importorskip("scipy.io").savemat
    fields = (
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "gloss",
        "num_children",
        "children",
        "wordnet_height",
        "num_train_images",
    )
    rows = [
        (i, wnid, f"word {i}, other {i}", "gloss", 0, [], 0, TRAIN_PER_CLASS)
        for i, wnid in enumerate(WNIDS, 1)
    ]
    rows += [
        (4, "n02083346", "canine", "gloss", 2, [1, 2], 1, 0),
        (5, "n00001740", "entity", "gloss", 2, [3, 4], 2, 0),
    ]
    synsets = np.empty((len(rows), 1), dtype=[(name, object) for name in fields])
    for i, row in enumerate(rows):
        synsets[i, 0] = row
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    root = "ILSVRC2012_devkit_t12/data"
    return {
        f"{root}/meta.mat": meta.getvalue(),
        f"{root}/ILSVRC2012_validation_ground_truth.txt": "".join(f"{i}\n" for i in TRUTH).encode(),
    }


def write_devkit_tar() -> Path:
    return write("src/ILSVRC2012_devkit_t12.tar.gz", tar(devkit_files(), "w:gz"))


def prepare(*flags: str, checksum: bool = False) -> None:
    words = "--source src --out out --workers 2" + ("" if checksum else " --no_checksum")
    main([*words.split(), *flags])


def verify() -> int:
    try:
        main(["--out", "out", "--verify", "--workers", "2"])
    except SystemExit as stop:
        return stop.code
    return 0


def contents(root: str = "out") -> dict[str, bytes]:
    return {
        str(p.relative_to(root)): p.read_bytes()
        for p in Path(root).rglob("*")
        if p.is_file() and p.name != ".lock"
    }


def expected(wnids=WNIDS) -> dict[str, bytes]:
    return {
        f"{split}/{wnid}/{name}": image(name)
        for split, names in (("train", TRAIN), ("val", VAL))
        for wnid in wnids
        for name in names[wnid]
    }


# What people have -------------------------------------------------------------------------------


def test_official_archives_with_the_devkit_become_a_tree(capsys):
    write_train_tar(), write_val_tar(), write_devkit_tar()
    before = contents("src")
    prepare()
    assert contents() == expected()
    assert contents("src") == before
    assert capsys.readouterr().out.splitlines()[-1] == (
        "9 train and 6 val images in 3 classes; next: python pretrain_imagenet.py --data_dir out"
    )
    assert [len(part) for part in load_imagenet("out")] == [9, 6, 3]


def test_our_devkit_is_one_that_torchvision_reads_to_the_same_labels(monkeypatch):
    md5 = hashlib.md5(write_devkit_tar().read_bytes()).hexdigest()
    monkeypatch.setitem(official.ARCHIVE_META, "devkit", ("ILSVRC2012_devkit_t12.tar.gz", md5))
    official.parse_devkit_archive("src")
    theirs = official.load_meta_file("src")[1]
    labels, archives = read_val_labels(Path("src"), Path("src/val"))
    assert [labels[f"ILSVRC2012_val_{i:08d}"] for i in range(1, 7)] == theirs
    assert archives == [Path("src/ILSVRC2012_devkit_t12.tar.gz")]


def test_class_tars_are_preferred_to_half_unpacked_folders():
    write_train_folder("src/train")
    for wnid in WNIDS[:2]:
        write(f"src/train/{wnid}.tar", class_tar(wnid))
        Path(f"src/train/{wnid}/{wnid}_0.JPEG").write_bytes(b"half")
        Path(f"src/train/{wnid}/{wnid}_1.JPEG").unlink()
    write_flat_val("src/val")
    write_valprep("src/val/valprep.sh")
    prepare()
    assert contents() == expected()


def test_the_layout_of_kaggle_becomes_a_tree():
    write_train_folder("src/ILSVRC/Data/CLS-LOC/train")
    write_flat_val("src/ILSVRC/Data/CLS-LOC/val")
    with open("src/LOC_val_solution.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["ImageId", "PredictionString"])
        rows.writerows(
            [name[:-5], f"{wnid} 85 1 499 272 {wnid} 3 4 5 6 "] for name, wnid in LABELS.items()
        )
    prepare()
    assert contents() == expected()


@pytest.mark.parametrize("where", ["src/ILSVRC2012_devkit_t12", "src"])
def test_flat_val_with_the_unpacked_devkit(where):
    write_train_folder("src/train")
    write_flat_val("src/val")
    for name, content in devkit_files().items():
        write(f"{where}/data/{Path(name).name}", content)
    prepare()
    assert contents() == expected()


def test_flat_val_with_ground_truth_and_a_list_in_the_devkits_order():
    write_train_folder("src/train")
    write_flat_val("src/val")
    write("src/ILSVRC2012_validation_ground_truth.txt", "".join(f"{i}\n" for i in TRUTH))
    write("src/map_clsloc.txt", "".join(f"{w} {i} word\n" for i, w in enumerate(WNIDS, 1)))
    # As Kaggle has it: the same wnids in alphabetical order, which would mislabel every image.
    write("src/LOC_synset_mapping.txt", "".join(f"{w} word\n" for w in sorted(WNIDS)))
    prepare()
    assert contents() == expected()
    shutil.rmtree("out")
    Path("src/map_clsloc.txt").unlink()
    with pytest.raises(UserError, match="devkit's order.*found: LOC_synset_mapping.txt"):
        prepare()
    assert not Path("out").exists()


def test_tiny_imagenet_becomes_a_tree():
    write_train_folder("src/train", inner="images")
    write("src/train/n02119789/n02119789_boxes.txt", "n02119789_0.JPEG\t0\t0\t1\t1\n")
    write_flat_val("src/val/images")
    write(
        "src/val/val_annotations.txt",
        "".join(f"{name}\t{wnid}\t0\t32\t44\t62\n" for name, wnid in LABELS.items()),
    )
    prepare()
    assert contents() == expected()


def test_tiny_imagenet_whose_validation_images_were_moved_into_class_folders():
    write_train_folder("src/train", inner="images")
    for name, wnid in LABELS.items():
        write(f"src/val/images/{wnid}/{name}", image(name))
    prepare()
    assert contents() == expected()


@pytest.mark.parametrize("prefix", ["", "./"])
@pytest.mark.parametrize(
    "name, mode",
    [
        ("ILSVRC2012_devkit_t12.tar.gz", "w:gz"),
        ("ILSVRC2012_devkit_t12.tar.gz", "w"),  # a browser unpacked it and kept its name
        ("ILSVRC2012_devkit_t12.tar", "w"),
        ("ILSVRC2012_devkit_t12.tar", "w:gz"),
    ],
)
def test_the_devkit_is_read_however_it_was_downloaded_or_packed_again(name, mode, prefix):
    kit = {prefix + name: content for name, content in devkit_files().items()}
    kit["__MACOSX/ILSVRC2012_devkit_t12/data/._meta.mat"] = b"a resource fork"
    write(f"src/{name}", tar(kit, mode))
    labels, archives = read_val_labels(Path("src"), Path("src/val"))
    assert labels == {Path(name).stem: wnid for name, wnid in LABELS.items()}
    # Only what has a published checksum is compared with it.
    assert bool(archives) == (name.endswith(".gz") and mode == "w:gz")


def test_files_that_macos_adds_to_the_archives_are_left_out():
    classes = {f"./{wnid}.tar": class_tar(wnid) for wnid in WNIDS}
    forks = {f"{folder}._{wnid}.tar": b"fork" for wnid in WNIDS for folder in ("./", "__MACOSX/")}
    write("src/ILSVRC2012_img_train.tar", tar({**forks, **classes, "./.DS_Store": b"x"}))
    images = {f"./{name}": image(name) for name in LABELS}
    forks = {f"./._{name}": b"fork" for name in LABELS}
    write("src/ILSVRC2012_img_val.tar", tar({**forks, **images}))
    write_valprep()
    prepare()
    assert contents() == expected()


ENCODINGS = ["utf-8-sig", "utf-16", "latin-1"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("source", ["valprep", "kaggle", "tiny", "truth"])
def test_lists_of_labels_may_have_any_common_encoding(source, encoding):
    Path("src").mkdir()
    note = {"latin-1": "caf\xe9"}.get(encoding, "caf\xe9 \u732b")
    stems = {Path(name).stem: wnid for name, wnid in LABELS.items()}
    if source == "valprep":
        text = f"# {note}\n" + "".join(f"mv {name} {w}/\n" for name, w in LABELS.items())
        files = {"valprep.sh": text}
    elif source == "kaggle":
        rows = "".join(f"{stem},{wnid} 1 2 3 4\n" for stem, wnid in stems.items())
        files = {"LOC_val_solution.csv": f"{note},PredictionString\n" + rows}
    elif source == "tiny":
        rows = "".join(f"{name}\t{wnid}\t{note}\n" for name, wnid in LABELS.items())
        files = {"val_annotations.txt": rows}
    else:
        truth = "".join(f"{i}\n" for i in TRUTH)
        rows = "".join(f"{wnid} {i} {note}\n" for i, wnid in enumerate(WNIDS, 1))
        files = {"ILSVRC2012_validation_ground_truth.txt": truth, "map_clsloc.txt": rows}
    for name, text in files.items():
        write(f"src/{name}", text.encode(encoding))
    assert read_val_labels(Path("src"), Path("src/val"))[0] == stems


def write_tree() -> None:
    write_train_folder("src/train")
    for name, wnid in LABELS.items():
        write(f"src/val/{wnid}/{name}", image(name))


def test_a_tree_is_hard_linked_copied_on_request_and_symlinked_to_other_disks(monkeypatch, capsys):
    write_tree()
    write("src/train/.ipynb_checkpoints/x.JPEG", b"")
    write("src/train/n02119789/._n02119789_0.JPEG", b"a resource fork")
    name = "train/n02119789/n02119789_1.JPEG"
    prepare()
    assert contents() == expected()
    assert os.path.samefile(f"out/{name}", f"src/{name}") and not os.path.islink(f"out/{name}")
    assert "note:" not in capsys.readouterr().out
    shutil.rmtree("out")
    prepare("--copy")
    assert contents() == expected() and not os.path.samefile(f"out/{name}", f"src/{name}")
    shutil.rmtree("out")

    def other_disk(*args, **kwargs):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_disk)
    prepare()
    assert contents() == expected()
    assert os.readlink(f"out/{name}") == os.path.realpath(f"src/{name}")
    assert "note: out links to files in src: keep them" in capsys.readouterr().out


def test_links_of_a_linked_tree_point_at_the_files():
    write_tree()
    name = "n02119789/n02119789_1.JPEG"
    write("elsewhere/x.JPEG", Path(f"src/train/{name}").read_bytes())
    Path(f"src/train/{name}").unlink()
    Path(f"src/train/{name}").symlink_to("../../../elsewhere/x.JPEG")  # valid only in this folder
    prepare("--out", "deeper/down/out")
    assert contents("deeper/down/out") == expected()
    assert os.path.samefile(f"deeper/down/out/train/{name}", "elsewhere/x.JPEG")


# Subsets ----------------------------------------------------------------------------------------


def test_subset_by_number_is_the_same_every_time_and_takes_both_splits():
    write_train_tar(), write_val_tar(), write_valprep()
    prepare("--subset", "2")
    chosen = ["n01440764", "n02119789"]  # the first two by sha256sum of the wnid
    assert contents() == expected(chosen)
    shutil.rmtree("src/"), shutil.rmtree("out")
    write_tree()
    prepare("--subset", "2")
    assert contents() == expected(chosen)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_subset_list_may_have_any_common_encoding(encoding):
    write_tree()
    write("list.txt", "n02119789 caf\xe9\r\nn01440764\r\n".encode(encoding))
    prepare("--subset", "list.txt")
    assert contents() == expected(["n02119789", "n01440764"])


def test_subset_by_file_and_what_is_refused():
    write_tree()
    write("list.txt", "n02119789 kit fox\n\nn01440764\n")
    prepare("--subset", "list.txt")
    assert contents() == expected(["n02119789", "n01440764"])
    write("list.txt", "n02119789\nn99999999\n")
    for subset, message in (
        ("list.txt", "'n99999999'"),
        ("4", "has 3 classes"),
        ("0", "3 classes"),
        ("nowhere.txt", "neither a number nor a file"),
    ):
        with pytest.raises(UserError, match=message):
            prepare("--subset", subset)
    with pytest.raises(UserError, match="not one of the classes to prepare.*empty --out"):
        prepare("--subset", "1")


# Interruptions ----------------------------------------------------------------------------------


def test_a_run_killed_in_the_middle_of_a_class_is_resumed():
    """kill -9 of the main process while a worker is between two images of a class."""
    write_train_tar(), write_val_tar(), write_valprep()
    write(
        "interrupted.py",
        """
import os, signal, sys, tarfile, time
from multiprocessing import parent_process

extract = tarfile.TarFile.extract

def extract_until(self, member, *args, **kwargs):
    if member.name == "n02100735_1.JPEG":
        open("worker", "w").write(str(os.getpid()))
        os.kill(parent_process().pid, signal.SIGKILL)
        time.sleep(60)
    return extract(self, member, *args, **kwargs)

tarfile.TarFile.extract = extract_until
from tools.prepare_imagenet.__main__ import main

if __name__ == "__main__":
    main(["--source", "src", "--out", "out", "--no_checksum", "--workers", "1"])
""",
    )
    killed = subprocess.run(
        [sys.executable, "interrupted.py"],
        capture_output=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )
    assert killed.returncode == -9, killed.stderr.decode()
    worker, end = int(Path("worker").read_text()), time.monotonic() + 10
    while running(worker):  # an orphan would write beside the run that resumes
        assert time.monotonic() < end, "the worker outlived its parent"
        time.sleep(0.02)
    assert contents() == {
        **{k: v for k, v in expected().items() if "train/n01440764" in k},
        "train/.n02100735.part/n02100735_0.JPEG": image("n02100735_0.JPEG"),
    }
    assert verify() == 1
    kept = os.stat("out/train/n01440764").st_ino
    prepare()
    assert contents() == expected() and verify() == 0
    assert os.stat("out/train/n01440764").st_ino == kept
    prepare()  # once more: nothing left to do
    assert contents() == expected()


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")  # a zombie that nobody reaps is dead as well
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / "n02100735_1.JPEG").unlink(),  # tar interrupted by hand
        lambda folder: (folder / "n02100735_1.JPEG").write_bytes(b""),  # power cut
        lambda folder: (folder / "mine.JPEG").write_bytes(b"x"),
    ],
)
def test_folders_that_only_look_finished_are_named_and_kept(harm):
    write_train_tar(), write_val_tar(), write_valprep()
    prepare()
    harm(Path("out/train/n02100735"))
    before = contents()
    with pytest.raises(UserError, match="out/train/n02100735: remove these folders"):
        prepare()
    assert contents() == before
    shutil.rmtree("out/train/n02100735")
    prepare()
    assert contents() == expected()


def test_two_runs_do_not_write_one_tree(locked_by_another):
    write_tree()
    told = "out is in use by another running process"
    with locked_by_another("out"), pytest.raises(Busy, match=told):
        prepare()
    prepare()


def test_a_file_system_without_locks_can_be_prepared_on(monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "lockf", refuse)
    with pytest.raises(UserError, match="file system without locks"), lock_folder(Path("x")):
        pass
    write_tree()
    prepare()
    assert contents() == expected()


# Bad archives and bad places --------------------------------------------------------------------


def test_official_archives_need_the_official_checksums(monkeypatch):
    train, _, _ = write_train_tar(), write_val_tar(), write_valprep()
    with pytest.raises(UserError, match="ILSVRC2012_img_train.tar has MD5.*--no_checksum"):
        prepare(checksum=True)
    assert contents() == {}
    for key in ("train", "val"):
        name = official.ARCHIVE_META[key][0]
        md5 = hashlib.md5((train.parent / name).read_bytes()).hexdigest()
        monkeypatch.setitem(official.ARCHIVE_META, key, (name, md5))
    prepare(checksum=True)
    assert contents() == expected()


def evil(kind: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo(
            {"absolute": "/tmp/n1.JPEG", "parent": "../../n1.JPEG"}.get(kind, "n1.JPEG")
        )
        if kind == "symlink":
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        if kind == "hardlink":
            member.type, member.linkname = tarfile.LNKTYPE, "/etc/passwd"
        if kind == "fifo":
            member.type = tarfile.FIFOTYPE
        archive.addfile(member)
        if kind == "twice":
            archive.addfile(tarfile.TarInfo("sub/n1.JPEG"))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["absolute", "parent", "symlink", "hardlink", "fifo", "twice"])
def test_hostile_members_are_refused_before_anything_of_the_class_is_written(kind):
    write_tree()
    write("src/train/n02119789.tar", evil(kind))
    with pytest.raises(UserError, match="src/train/n02119789.tar holds.*nothing of it was extr"):
        prepare()
    assert not any("n02119789" in name for name in contents() if name.startswith("train"))


@pytest.mark.parametrize("cut", ["in a file", "between files", "in a header"])
def test_cut_off_archives_are_never_taken_for_shorter_ones(cut):
    write_tree()
    first = 512 + 512 * -(-len(image("n02119789_0.JPEG")) // 512)  # its header and its blocks
    length = {"in a file": first - 600, "between files": first, "in a header": first + 100}[cut]
    write("src/train/n02119789.tar", class_tar("n02119789")[:length])
    with pytest.raises(UserError, match="n02119789.tar is (cut off|damaged).*again"):
        prepare()
    assert not Path("out/train/n02119789").exists()
    whole = write_train_tar()
    whole.write_bytes(whole.read_bytes()[:-30_000])
    with pytest.raises(UserError, match="ILSVRC2012_img_train.tar is (cut off|damaged).*again"):
        prepare()


def test_too_little_space_is_reported_before_anything_is_written(monkeypatch):
    write_train_tar(), write_val_tar(), write_valprep()
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000))
    with pytest.raises(UserError, match="needs about 0.0 GB.*another disk"):
        prepare()
    assert contents() == {}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    shutil.rmtree("src")
    write_tree()
    prepare()  # links need none
    shutil.rmtree("out")
    with pytest.raises(UserError, match="choose a folder on another disk"):
        prepare("--copy")


def no_labels():
    Path("src/valprep.sh").unlink()


def one_label_less():
    path = Path("src/valprep.sh")
    path.write_text(path.read_text().replace("mv ILSVRC2012_val_00000003.JPEG", "#"))


def half_moved():
    Path("src/val/n01440764").mkdir()
    shutil.move("src/val/ILSVRC2012_val_00000001.JPEG", "src/val/n01440764")


@pytest.mark.parametrize(
    "harm, message",
    [
        (no_labels, "no labels of the validation images: put valprep.sh"),
        (one_label_less, r"no label is known for 1 of 6 .*00000003"),
        (
            lambda: Path("src/val/ILSVRC2012_val_00000002.JPEG").unlink(),
            "it lacks 1 of 6 .*00000002",
        ),
        (lambda: write("src/valprep.sh", "<html>"), "valprep.sh has no labels"),
        (half_moved, "5 loose images beside filled class folders"),
        (lambda: shutil.rmtree("src/val"), "has no val images: expected ILSVRC2012_img_val.tar"),
        (
            lambda: shutil.rmtree("src/train"),
            "has no train images: expected ILSVRC2012_img_train.tar",
        ),
        (lambda: shutil.rmtree("src"), "src is not a folder"),
        (lambda: shutil.rmtree("src/train/n01440764"), "1 classes have val images and no train"),
        (
            lambda: write("src/ILSVRC2012_img_train.tar", tar({"a.JPEG": b"x"})),
            "expected only class",
        ),
        (lambda: write("src/ILSVRC2012_img_train.tar", b"<html>not found</html>"), "is damaged"),
    ],
)
def test_wrong_sources_are_refused_in_one_line_before_anything_is_written(harm, message):
    write_train_folder("src/train")
    write_flat_val("src/val")
    write_valprep()
    harm()
    with pytest.raises(UserError, match=message) as caught:
        prepare()
    assert "\n" not in str(caught.value) and not Path("out").exists()


def test_a_damaged_devkit_and_a_missing_scipy_are_named(monkeypatch):
    write_train_tar(), write_val_tar()
    kit = write_devkit_tar()
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "scipy.io", None)
        with pytest.raises(UserError, match="needs scipy: pip install scipy .or put valprep.sh"):
            prepare()
        write_valprep()
        prepare()  # which needs none
        assert contents() == expected()
    Path("src/valprep.sh").unlink()
    kit.write_bytes(kit.read_bytes()[:-200])
    with pytest.raises(UserError, match="cannot be read as the devkit.*download it again"):
        read_val_labels(kit.parent, kit.parent / "val")


def test_ground_truth_with_more_classes_than_the_devkit_is_refused():
    write_train_tar(), write_val_tar()
    for name, content in devkit_files().items():
        write(f"src/data/{Path(name).name}", content)
    write("src/data/ILSVRC2012_validation_ground_truth.txt", "1\n2\n4\n")  # 4: canine, no class
    with pytest.raises(UserError, match="4 is not the number of any of the 3 classes"):
        prepare()


def test_the_source_is_never_written_into():
    write_train_folder("src/ILSVRC/Data/CLS-LOC/train")
    write_flat_val("src/ILSVRC/Data/CLS-LOC/val")
    write_valprep()
    before = contents("src")
    for out in ("src/ILSVRC/Data/CLS-LOC", "src/ILSVRC/Data/CLS-LOC/val"):
        with pytest.raises(UserError, match="would change the downloads"):
            prepare("--out", out)
    assert contents("src") == before


# --verify and the command line ------------------------------------------------------------------


def test_verify_lists_broken_images(capsys):
    write_tree()
    prepare("--copy")
    assert verify() == 0 and "out: nothing is broken" in capsys.readouterr().out
    cut, text = Path("out/train/n01440764/n01440764_2.JPEG"), Path("out/val/n02100735/x.JPEG")
    cut.write_bytes(cut.read_bytes()[:-100])
    text.write_text("<html>")
    capsys.readouterr()
    assert verify() == 1
    broken = [line for line in capsys.readouterr().out.splitlines() if line.startswith("broken: ")]
    assert [line.split()[1] for line in broken] == [str(cut), str(text)]
    shutil.rmtree("out/val/n02100735")
    assert verify() == 1
    assert "it lacks 1 (n02100735)" in capsys.readouterr().out


def test_verify_refuses_a_pack():
    write_imagenet_tree(
        Path("tree"), train_per_class=2, val_per_class=1, size=32, seed=0, num_classes=2
    )
    pack.main(["--data_dir", "tree", "--out", "out", "--workers", "0"])
    with pytest.raises(UserError, match="--out out is packed: tools.pack checks it"):
        verify()


def test_archives_are_extracted_by_a_python_without_filters(monkeypatch):
    write_train_tar()
    write_flat_val("src/val")
    write_valprep("src/val/valprep.sh")
    extract = tarfile.TarFile.extract
    monkeypatch.delattr(tarfile, "data_filter")
    monkeypatch.setattr(
        tarfile.TarFile, "extract", lambda self, member, path: extract(self, member, path)
    )
    prepare()
    assert contents() == expected()


def test_verify_reports_unfinished_class_folders(capsys):
    write_tree()
    prepare()
    Path("out/val/.n02100735.part").mkdir()
    capsys.readouterr()
    assert verify() == 1
    assert capsys.readouterr().out == (
        "broken: out/val/.n02100735.part is unfinished: run with --source again\n"
    )


def test_a_tree_with_fewer_images_than_imagenet_is_reported():
    def lines(train: int, val: int, classes: int = 1000) -> list[str]:
        files = [
            type("Images", (list,), {"root": root})([0] * n)
            for root, n in (("train", train), ("val", val))
        ]
        return describe_missing(*files, ["n"] * classes)

    assert lines(1_281_167, 50_000) == []
    assert lines(1_281_166, 50_000) == ["train has 1,281,166 images, ImageNet-1K has 1,281,167"]
    assert lines(1_281_167, 49_950) == ["val has 49,950 images, ImageNet-1K has 50,000"]
    assert lines(34_745, 3_923) == []  # ImageNet-Mini has 1,000 classes too
    assert lines(126_689, 5_000, classes=100) == []


def test_wrong_command_lines_are_one_line_and_exit_with_2():
    def call(*flags):
        return subprocess.run(
            [sys.executable, "-m", "tools.prepare_imagenet", *flags],
            cwd=REPO,
            capture_output=True,
            text=True,
        )

    missing = call("--source", "/nowhere", "--out", "/nowhere/out", "--no-checksum")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr == (
        "error: --source /nowhere is not a folder: name the one with the downloads\n"
    )
    for flags, message in (
        (["--out", "x"], "--source is needed"),
        (["--out", "x", "--verify", "--copy"], "need --source"),
        (["--out", "x", "--verify", "--workers", "0"], "at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            parse_args(flags)


def test_links_that_lead_nowhere_are_listed(tmp_path):
    (tmp_path / "a.JPEG").symlink_to("missing")
    (tmp_path / "b.JPEG").mkdir()
    assert classes.list_folder(tmp_path) == ["a.JPEG"]


def test_a_file_system_without_links_is_named(tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "symlink", refuse)
    with pytest.raises(UserError, match="without links: add --copy"):
        classes._link("a", tmp_path / "b")
