"""common/files.py: atomic writes, JSON, text in any encoding, free space and locks.

Outputs that a user names are tested in test_outputs.py, locks over processes in test_run_dir.py.
"""

import contextlib
import errno
import os
from pathlib import Path

import pytest

from common.errors import Busy, UserError
from common.files import (
    is_locked,
    lock_folder,
    printable,
    read_json,
    read_text,
    remove_temporary_files,
    replace_by_link,
    require_free_space,
    sync_folder,
    temporary_beside,
    unused_path,
    write_atomic,
    write_json,
)


@pytest.mark.parametrize(("number", "raised"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_folders_are_synced_where_the_file_system_can(monkeypatch, number, raised):
    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input") if raised else contextlib.nullcontext():
        sync_folder(Path())


def test_write_atomic_leaves_the_old_file_when_it_fails(full_disk):
    path = Path("file")
    write_atomic(path, b"old")
    with full_disk(), pytest.raises(OSError):
        write_atomic(path, bytes(5000))
    assert os.listdir() == ["file"] and path.read_bytes() == b"old"
    write_atomic(path, "naïve")
    assert os.listdir() == ["file"] and path.read_bytes() == "naïve".encode()


def test_json_is_written_atomically_and_read_back():
    path = Path("x.json")
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1} and os.listdir() == ["x.json"]
    assert read_json(Path()) is None


def test_a_link_replaces_a_file_and_is_a_copy_where_there_are_no_links(monkeypatch):
    source, target = Path("source"), Path("target")
    source.write_bytes(b"new")
    target.write_bytes(b"old")
    replace_by_link(source, target)
    assert source.samefile(target)
    replace_by_link(source, target)  # by itself
    assert sorted(os.listdir()) == ["source", "target"]

    def no_links(*args):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    target.unlink()
    replace_by_link(source, target)
    assert target.read_bytes() == b"new" and not source.samefile(target)
    assert sorted(os.listdir()) == ["source", "target"]


def test_temporary_files_of_a_killed_writer_are_removed_and_nothing_else():
    kept = [".lock", "x.json", "x.tmp", ".draft.tmp1"]
    temporary = temporary_beside(Path("x.json"))
    assert temporary != temporary_beside(Path("x.json"))  # also of two processes of one number
    for name in [*kept, ".latest.pt.tmp0123abcd", temporary]:
        Path(name).touch()
    remove_temporary_files(Path())
    assert sorted(os.listdir()) == sorted(kept)


@pytest.mark.parametrize("name", ["y" * 255, "织" * 85])
def test_any_name_that_the_file_system_takes_is_written(name):
    write_atomic(Path(name), "content")
    assert os.listdir() == [name]


def test_an_error_names_the_file_that_was_to_be_written(full_disk):
    with full_disk(), pytest.raises(OSError) as full:
        write_atomic(Path("table.md"), bytes(5000))
    with pytest.raises(OSError) as closed:
        write_atomic(Path("/proc/table.md"), b"")
    Path("afile").touch()
    with pytest.raises(NotADirectoryError) as through:
        write_atomic(Path("afile/table.md"), b"")
    found = [error.value.filename for error in (full, closed, through)]
    assert found == ["table.md", "/proc/table.md", "afile/table.md"]


def test_an_unused_path_is_numbered():
    assert unused_path(Path("a.pt")) == Path("a.pt")
    for name in ("a.pt", "a-2.pt"):
        Path(name).touch()
    assert unused_path(Path("a.pt")) == Path("a-3.pt")


def test_too_little_free_space_is_one_line(tmp_path):
    require_free_space(tmp_path, 1)
    with pytest.raises(UserError, match=r"needs about \d+\.\d GB more and has .* GB free: make ro"):
        require_free_space(tmp_path, 1e18)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"a,b\n", "a,b\n"),
        ("ä\n".encode(), "ä\n"),
        ("ä\n".encode("utf-8-sig"), "ä\n"),
        ("ä\n".encode("utf-16"), "ä\n"),
        ("ä\n".encode("utf-16-be").join([b"\xfe\xff", b""]), "ä\n"),
        ("ä\n".encode("latin-1"), "ä\n"),
        (b"", ""),
    ],
)
def test_text_is_read_in_any_encoding(content, text):
    Path("list.txt").write_bytes(content)
    assert read_text(Path("list.txt")) == text


def test_names_that_are_not_utf8_are_printable():
    name = os.fsdecode(b"caf\xe9.jpg")
    assert printable(name) == printable(Path(name)) == "caf\\xe9.jpg"
    printable(name).encode("utf-8")
    assert printable("café.jpg") == "café.jpg"


def test_a_lock_is_held_inside_the_block(tmp_path):
    def child(work):
        process = os.fork()
        if process == 0:
            try:
                os._exit(work())
            except BaseException:
                os._exit(99)
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    def lock():
        try:
            with lock_folder(tmp_path, wait=0):
                return 0
        except Busy:
            return 3

    with lock_folder(tmp_path):
        assert child(lock) == 3
        assert child(lambda: int(is_locked(tmp_path))) == 1
    assert child(lock) == 0
    assert not is_locked(tmp_path)
