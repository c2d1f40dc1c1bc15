"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from alphaext.utils.files import (
    check_output_file,
    check_output_folder,
    file_digest,
    folder_lock,
    open_file,
    read_json,
    remove_leftovers,
    whole_file,
    whole_folder,
    write_json,
)
from alphaext.utils.resume import check_checkpoint


def test_a_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "file.bin"
    with whole_file(path) as file:
        file.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one" and os.listdir(tmp_path) == ["file.bin"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_what_was_there_stays_when_the_block_fails(tmp_path, error):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(error)), whole_file(path) as file:
        file.write(b"half of the new")
        raise error
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file.bin"]
    if isinstance(error, OSError):
        assert str(error) == f"[Errno {errno.ENOSPC}] No space left on device: '{path}'"


def test_json_goes_there_and_back_and_has_no_nan(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"nan": float("nan"), "infinite": [float("-inf"), 1.5], "path": Path("a/b"), "of": (1, "ü"), 3: True})
    assert read_json(path, "a test") == {"nan": None, "infinite": [None, 1.5], "path": "a/b", "of": [1, "ü"], "3": True}
    assert json.loads(path.read_text(encoding="utf-8"))["of"] == [1, "ü"]
    write_json(path, {"name": "\udcff.png"})
    assert read_json(path, "a test") == {"name": "\udcff.png"}


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"a": 1} x', b'{"a":' * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_what_is_no_json_object_is_named(tmp_path, content):
    path = tmp_path / "value.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="value.json is not a sidecar"):
        read_json(path, "a sidecar")


def test_a_link_stays_and_leads_to_the_new_content(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link, target = tmp_path / "link", tmp_path / "elsewhere" / "file"
    link.symlink_to(target)
    for content in (b"one", b"two"):
        with whole_file(link) as file:
            file.write(content)
        assert link.is_symlink() and target.read_bytes() == content
    assert os.listdir(tmp_path / "elsewhere") == ["file"]


@pytest.mark.parametrize("kind", ["pipe", "directory", "device"])
def test_what_is_no_file_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "it"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path = Path("/dev/zero")
    for function in (open_file, file_digest, lambda path: read_json(path, "a test")):
        with pytest.raises(ValueError, match=f"must be a file, got the {kind}"):
            function(path)
    with pytest.raises(ValueError, match=f"output must be a file, got the {kind}"):
        check_output_file(path, "output", overwrite=True)


def test_what_killed_processes_left_is_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mine, left, other = (tmp_path / f".a.bin.{process}.1.tmp" for process in (os.getpid(), dead.pid, f"x{dead.pid}"))
    for path in (mine, left, other, tmp_path / f".b.bin.{dead.pid}.1.tmp"):
        path.touch()
    check_output_file(tmp_path / "a.bin", "output")
    assert not left.exists() and mine.exists() and other.exists() and len(os.listdir(tmp_path)) == 3
    remove_leftovers(tmp_path)
    assert len(os.listdir(tmp_path)) == 2
    left.mkdir()
    (left / "inside").touch()
    check_output_folder(tmp_path / "a.bin", "output")
    assert not left.exists()
    with left.open("wb") as file:  # held by a process on another machine
        fcntl.flock(file, fcntl.LOCK_SH)
        remove_leftovers(tmp_path)
        assert left.exists()


def test_links_that_lead_nowhere_are_told_before_any_work(tmp_path):
    link = tmp_path / "link"
    link.symlink_to("gone/a.bin")
    with pytest.raises(ValueError, match="output must be a file in a directory that exists, got '.*link'"):
        check_output_file(link, "output")
    with pytest.raises(ValueError, match="checkpoint must be a file in a directory that exists, got '.*link'"):
        check_checkpoint(link)
    with pytest.raises(ValueError, match="output must be a folder, got a link that leads to none: '.*link'"):
        check_output_folder(link, "output")
    (tmp_path / "gone").mkdir()
    with whole_file(check_output_file(link, "output")) as file:
        file.write(b"one")
    assert link.is_symlink() and (tmp_path / "gone" / "a.bin").read_bytes() == b"one"


def test_a_full_disk_names_the_folder_that_was_asked_for(tmp_path):
    with (
        pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/new/a.bin'"),
        whole_folder(tmp_path / "new") as folder,
        whole_file(folder / "a.bin"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert os.listdir(tmp_path) == []


def test_a_folder_is_whole_or_not_there(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for name in ("new", "link"):
        with pytest.raises(KeyError), whole_folder(tmp_path / name):
            raise KeyError
        with whole_folder(tmp_path / name) as folder:
            (folder / "a").touch()
            remove_leftovers(tmp_path)  # of dead processes: this one is alive
        assert (tmp_path / name / "a").exists()
    assert sorted(os.listdir(tmp_path)) == ["link", "new", "real"] and (tmp_path / "link").is_symlink()
    (tmp_path / "late").mkdir()
    late = pytest.raises(ValueError, match=r"late' exists already: another process has written it in the meantime")
    with late, whole_folder(tmp_path / "late"):
        (tmp_path / "late" / "of another process").touch()
    assert os.listdir(tmp_path / "late") == ["of another process"]


def test_digest(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_output_files_are_checked_before_any_work(tmp_path):
    (tmp_path / "there").write_bytes(b"")
    assert check_output_file(tmp_path / "new", "output") == tmp_path / "new"
    assert check_output_file(tmp_path / "there", "output", overwrite=True) == tmp_path / "there"
    with pytest.raises(ValueError, match="output exists already"):
        check_output_file(tmp_path / "there", "output")
    with pytest.raises(ValueError, match="output must be a file in a directory that exists"):
        check_output_file(tmp_path / "no" / "file", "output")
    with pytest.raises(ValueError, match="output must be a file, got the directory"):
        check_output_file(tmp_path, "output")


HOLDER = """
import sys, time
from alphaext.utils.files import folder_lock
with folder_lock(sys.argv[1], "features"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_held_by_one_process_and_by_no_dead_one(tmp_path):
    # Started where no source tree hides an installed package.
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=tmp_path) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="another process is writing features into"), folder_lock(tmp_path, "features"):
            pass
        process.kill()
    with folder_lock(tmp_path, "features"):
        pass


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    context = multiprocessing.get_context("fork")
    started = context.Event()

    def live_on():
        started.set()
        time.sleep(60)

    with folder_lock(tmp_path, "features"):
        child = context.Process(target=live_on)
        child.start()
        assert started.wait(30)
    try:
        with folder_lock(tmp_path, "features"):
            assert child.is_alive()
    finally:
        child.kill()
        child.join()


def test_two_writers_of_one_file(tmp_path):
    path = tmp_path / "file.bin"
    with whole_file(path, overwrite=True) as first:
        first.write(b"first")
        for overwrite in (False, True):
            with pytest.raises(ValueError, match=r"another process is writing '.*file.bin'; wait for it or stop it"):
                _in_a_process(partial(_write, path, b"second", overwrite))
        _in_a_process(lambda: _write(tmp_path / "other.bin", b"third", False))
    assert path.read_bytes() == b"first" and sorted(os.listdir(tmp_path)) == ["file.bin", "other.bin"]
    with pytest.raises(ValueError, match=r"file.bin' exists already: another process has written it in the meantime"):
        _write(path, b"second", False)
    _write(path, b"second", True)
    assert path.read_bytes() == b"second"


def _write(path, content, overwrite):
    with whole_file(path, overwrite=overwrite) as file:
        file.write(content)


def _in_a_process(work):
    """Do it in another process, and raise here what is raised there."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def body():
        try:
            theirs.send(work())
        except Exception as error:
            theirs.send(error)

    child = context.Process(target=body)
    child.start()
    found = ours.recv()
    child.join()
    if isinstance(found, Exception):
        raise found


def test_many_writers_of_one_file_leave_one_whole(tmp_path):
    path, context = tmp_path / "file.bin", multiprocessing.get_context("fork")
    ready, wrote = context.Barrier(8), context.Queue()

    def body(number):
        ready.wait()
        try:
            _write(path, bytes([number]) * 100_000, False)
        except ValueError:
            return
        wrote.put(number)

    children = [context.Process(target=body, args=(number,)) for number in range(8)]
    for child in children:
        child.start()
    winner = wrote.get(timeout=30)
    for child in children:
        child.join()
    assert all(child.exitcode == 0 for child in children) and wrote.empty()
    assert path.read_bytes() == bytes([winner]) * 100_000 and os.listdir(tmp_path) == ["file.bin"]


@pytest.mark.parametrize("how", ["bytes", "torch", "torch, at its end", "json", "two pieces"])
@pytest.mark.parametrize("overwrite", [None, True])
def test_what_there_is_no_room_for_names_the_file(tmp_path, how, overwrite):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        with whole_file(path, overwrite=overwrite) as file:
            if how.startswith("torch"):
                torch.save({"w": torch.ones(100_000 if how == "torch" else 700)}, file)
            elif how == "json":
                write_json(path, {"long": ["value"] * 10_000})
            else:
                for _ in range(2):
                    file.write(bytes(100_000 if how == "bytes" else 4000))

    with pytest.raises(OSError, match=rf"File too large: '{path}'$") as error:
        _in_a_process(work)
    assert error.value.errno == errno.EFBIG and path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file.bin"]


def test_an_error_of_torch_stays_what_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="of another kind"), whole_file(tmp_path / "file.bin"):
        raise RuntimeError("of another kind")
    assert os.listdir(tmp_path) == []
