import os
import re
from contextlib import closing

import pytest

from rl_buffer import directory as module
from rl_buffer.directory import Directory
from rl_buffer.errors import AddressInUse, InvalidInput, NotEnoughMemory, RLBufferError

CONFIGURATION = {"format": 1, "tables": {"a": {"capacity": 5, "shape": (1, 2)}, "b": {"x": None}}}
NBYTES = 4096


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep/tables"


def fill(path):
    with closing(Directory(path, CONFIGURATION)) as directory:
        directory.segment("0.rows", NBYTES).array("uint8")[:] = 7
        directory.complete()


def test_files_of_a_complete_directory_hold_what_was_in_them(path):
    fill(path)
    with closing(Directory(path, CONFIGURATION)) as directory:
        assert not directory.is_new
        assert (directory.segment("0.rows", NBYTES).array("uint8") == 7).all()


def test_a_directory_that_was_not_completed_leaves_nothing_where_nothing_was(path):
    with closing(Directory(path, CONFIGURATION)) as directory:
        assert directory.is_new
        directory.segment("0.rows", NBYTES)
    assert not path.exists()


def test_a_directory_that_was_not_completed_leaves_what_others_put_there(path):
    path.mkdir(mode=0o700, parents=True)
    (path / "notes").write_text("mine")
    with closing(Directory(path, CONFIGURATION)) as directory:
        directory.segment("0.rows", NBYTES)
    assert {file.name for file in path.iterdir()} <= {"notes", "directory.lock"}


def test_what_a_kill_left_of_an_incomplete_directory_is_made_anew(path):
    fill(path)
    (path / "tables.json").rename(path / "tables.json.unfinished")
    with closing(Directory(path, CONFIGURATION)) as directory:
        assert directory.is_new
        assert not directory.segment("0.rows", NBYTES).array("uint8").any()
        directory.complete()
    assert sorted(os.listdir(path)) == ["0.rows", "directory.lock", "tables.json"]


def test_a_directory_is_one_server_s_until_it_is_closed(path):
    with closing(Directory(path, CONFIGURATION)):
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(AddressInUse, match=f"another server keeps its tables in {path}; stop it"):
            Directory(path, CONFIGURATION)
        assert len(os.listdir("/proc/self/fd")) == before
    Directory(path, CONFIGURATION).close()


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda c: c | {"format": 2}, "format was 1, and is 2"),
        (
            lambda c: c | {"tables": c["tables"] | {"a": {"capacity": 5, "shape": (2,)}}},
            "tables.a.shape was [1, 2], and",
        ),
        (lambda c: c | {"tables": {"a": c["tables"]["a"]}}, "tables.b was {'x': None}, and is not there"),
        (lambda c: c | {"tables": c["tables"] | {"b": {"x": 0}}}, "tables.b.x was None, and is 0"),
        (lambda c: c | {"tables": c["tables"] | {"b": 3}}, "tables.b was {'x': None}, and is 3"),
    ],
)
def test_another_configuration_is_refused_by_its_first_difference(path, change, difference):
    fill(path)
    with pytest.raises(InvalidInput, match=re.escape(f"{path} holds tables of another configuration: {difference}")):
        Directory(path, change(CONFIGURATION))
    Directory(path, CONFIGURATION).close()  # it was let go


def test_a_file_system_that_breaks_its_word_is_told_of_and_nothing_is_kept(path, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    before = len(os.listdir("/proc/self/fd"))
    with (
        closing(Directory(path, CONFIGURATION)) as directory,
        pytest.raises(NotEnoughMemory, match=r"could not reserve 4,096 bytes for .*/0\.rows: .*No space left"),
    ):
        directory.segment("0.rows", NBYTES)
    assert not path.exists()
    assert len(os.listdir("/proc/self/fd")) == before


def test_room_is_needed_for_new_files_only(path, monkeypatch):
    fill(path)
    status = os.statvfs(path)
    fields = [*status]
    fields[4] = 0  # f_bavail

    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(fields))
    with closing(Directory(path, CONFIGURATION)) as directory:
        directory.check_room({"0.rows": NBYTES})
        with pytest.raises(
            NotEnoughMemory, match=r"need 1\.00 GiB in .*, and its file system has 0\.00 GiB left; lower"
        ):
            directory.check_room({"0.rows": NBYTES + 2**30})


def test_files_in_a_tmpfs_are_memory_that_must_be_there(monkeypatch, tmp_path):
    assert module._is_in_memory("/dev/shm")
    assert not module._is_in_memory("/proc")
    checked = []
    monkeypatch.setattr(module, "check_memory", checked.append)
    for is_in_memory in (False, True):
        monkeypatch.setattr(module, "_is_in_memory", lambda _, answer=is_in_memory: answer)
        with closing(Directory(tmp_path / "tables", CONFIGURATION)) as directory:
            directory.check_room({"0.rows": NBYTES})
    assert checked == [NBYTES]


def test_a_file_of_another_size_is_refused(path):
    fill(path)
    with closing(Directory(path, CONFIGURATION)) as directory, pytest.raises(RLBufferError, match="has 4096 bytes"):
        directory.segment("0.rows", 2 * NBYTES)
