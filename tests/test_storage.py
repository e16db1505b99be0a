import fcntl
import gc
import mmap
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from rl_buffer import storage
from rl_buffer.errors import ForkedClient, NotEnoughMemory, RLBufferError
from rl_buffer.storage import FileSegment, OwnedSegment, ProcessGuard, Segment, available_memory_nbytes, check_memory

NBYTES = 3 * mmap.PAGESIZE


@pytest.fixture
def owned():
    segment = OwnedSegment("rows", NBYTES)
    yield segment
    segment.close()


@pytest.fixture
def memfd():
    """A memfd of the promised size, without seals."""
    fd = os.memfd_create("other", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, NBYTES)
    yield fd
    os.close(fd)


def open_descriptors():
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_what_one_mapping_writes_the_other_reads(owned):
    reader = Segment(owned.fd, NBYTES, writable=True)
    numbers = owned.array("int64")
    numbers[:] = np.arange(len(numbers))
    assert (reader.array("int64") == np.arange(NBYTES // 8)).all()
    reader.array("int64")[0] = -1
    assert numbers[0] == -1


def test_new_memory_is_zero_and_backed(owned):
    assert not owned.array("uint8").any()
    assert os.fstat(owned.fd).st_blocks * 512 >= NBYTES


@pytest.mark.parametrize("promised", [NBYTES + 1, NBYTES - 1, 2**40, 0])
def test_a_segment_of_another_size_than_promised_is_refused(owned, promised):
    with pytest.raises(RLBufferError, match=f"has {NBYTES} bytes, the server promised {promised}"):
        Segment(owned.fd, promised, writable=False)


@pytest.mark.parametrize("seals", [0, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SHRINK])
def test_a_segment_that_could_be_cut_short_later_is_refused(memfd, seals):
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, seals)
    with pytest.raises(RLBufferError, match="not sealed against resizing; it is not from this server"):
        Segment(memfd, NBYTES, writable=False)


def test_a_descriptor_that_is_no_memfd_is_refused():
    with tempfile.TemporaryFile(dir=Path(__file__).parent) as file:
        file.truncate(NBYTES)
        with pytest.raises(RLBufferError, match="not sealed"):
            Segment(file.fileno(), NBYTES, writable=False)


@pytest.mark.parametrize("nbytes", [0, mmap.PAGESIZE, 2 * NBYTES])
def test_an_owned_segment_can_be_neither_cut_nor_grown(owned, nbytes):
    with pytest.raises(PermissionError):
        os.ftruncate(owned.fd, nbytes)


def test_readers_cannot_map_a_readers_only_segment_writable():
    owned = OwnedSegment("generations", NBYTES, readers_only=True)
    with pytest.raises(PermissionError):
        Segment(owned.fd, NBYTES, writable=True)
    with pytest.raises(PermissionError):
        os.write(owned.fd, b"x")
    reader = Segment(owned.fd, NBYTES, writable=False)
    owned.array("int64")[7] = 42
    assert reader.array("int64")[7] == 42
    with pytest.raises(ValueError, match="read-only"):
        reader.array("int64")[7] = 0
    with pytest.raises(PermissionError):
        mprotect_writable(reader)
    owned.close()


def mprotect_writable(segment):
    """Ask the kernel for what Python does not offer: to make a read-only mapping writable."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    address = segment.array("uint8").ctypes.data
    if libc.mprotect(ctypes.c_void_p(address), NBYTES, mmap.PROT_READ | mmap.PROT_WRITE):
        raise OSError(ctypes.get_errno(), "mprotect")


def test_an_array_outlives_the_segment_and_its_descriptor():
    segment = OwnedSegment("rows", NBYTES)
    array = segment.array("int64")
    segment.close()
    segment.close()
    del segment
    gc.collect()
    array[:] = 5
    assert array.sum() == 5 * NBYTES // 8


def test_progress_is_told_piece_by_piece(monkeypatch):
    monkeypatch.setattr(storage, "_RESERVE_STEP_NBYTES", mmap.PAGESIZE)
    told = []
    OwnedSegment("rows", 2 * mmap.PAGESIZE + 1, progress=lambda *numbers: told.append(numbers)).close()
    total = 2 * mmap.PAGESIZE + 1
    assert told == [(mmap.PAGESIZE, total), (2 * mmap.PAGESIZE, total), (total, total)]


def test_memory_that_the_kernel_does_not_give_is_refused_and_nothing_is_kept(monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    before = open_descriptors()
    with pytest.raises(NotEnoughMemory, match=r"could not reserve 12,288 bytes for rows: .*No space left"):
        OwnedSegment("rows", NBYTES)
    assert open_descriptors() == before


def test_a_progress_that_raises_leaves_no_descriptor():
    def interrupt(*_):
        raise KeyboardInterrupt

    before = open_descriptors()
    with pytest.raises(KeyboardInterrupt):
        OwnedSegment("rows", NBYTES, progress=interrupt)
    assert open_descriptors() == before


@pytest.mark.parametrize("name", ["", "x" * 1000, "a\0b", "größe/ünicode" * 50])
def test_a_segment_may_have_any_name(name):
    segment = OwnedSegment(f"parameters:{name}", NBYTES)
    assert "rl_buffer:parameters" in os.readlink(f"/proc/self/fd/{segment.fd}")
    segment.close()


GIB = 2**30


def test_memory_that_is_not_there_is_refused_with_need_have_and_hint(monkeypatch):
    monkeypatch.setattr(storage, "available_memory_nbytes", lambda: 4 * GIB)
    check_memory(3 * GIB)
    check_memory(4 * GIB - storage._MEMORY_KEPT_FREE_NBYTES)
    for need in (4 * GIB - storage._MEMORY_KEPT_FREE_NBYTES + 1, 2**80):
        with pytest.raises(NotEnoughMemory, match=rf"need {need / GIB:.2f} GiB, and 4.00 GiB .*lower capacity"):
            check_memory(need)


def test_available_memory_is_no_more_than_the_machine_says():
    meminfo = Path("/proc/meminfo").read_text()
    total = int(meminfo.split("MemTotal:")[1].split()[0]) * 1024
    assert 0 < available_memory_nbytes() <= total


@pytest.mark.parametrize(
    ("limits", "available"),
    [
        ({}, 1000 * 1024),
        ({"outer": ("max", "5")}, 1000 * 1024),
        ({"outer": ("900000", "100000")}, 800_000),
        ({"outer": ("900000", "100000"), "outer/inner": ("700000", "50000")}, 650_000),
        ({"outer/inner": ("99999999999", "0")}, 1000 * 1024),
    ],
    ids=["no cgroup", "no limit", "limit above", "tighter limit below", "limit beyond the machine"],
)
def test_the_tightest_cgroup_limit_counts(tmp_path, monkeypatch, limits, available):
    for group, (limit, used) in limits.items():
        (tmp_path / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / group / "memory.max").write_text(limit + "\n")
        (tmp_path / group / "memory.current").write_text(used + "\n")
    monkeypatch.setattr(storage, "_cgroups", lambda: [tmp_path / "outer/inner", tmp_path / "outer", tmp_path])
    read_text = Path.read_text

    def meminfo(path, *arguments):
        return (
            "MemTotal: 2000 kB\nMemAvailable: 1000 kB\n"
            if str(path) == "/proc/meminfo"
            else read_text(path, *arguments)
        )

    monkeypatch.setattr(Path, "read_text", meminfo)
    assert available_memory_nbytes() == available


FORK = """
import os, signal, sys
from rl_buffer.errors import ForkedClient
from rl_buffer.storage import OwnedSegment, ProcessGuard, Segment

owned = OwnedSegment("rows", 4096)
array = Segment(owned.fd, 4096, writable=True).array("uint8")
guard = ProcessGuard()
guard.check()
array[0] = 7

def status_of(child):
    pid = os.fork()
    if pid == 0:
        os._exit(child())
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def touch():
    array[0] = 8
    return 0

def check():
    try:
        guard.check()
    except ForkedClient as error:
        return 42 if str(os.getpid()) in str(error) and str(os.getppid()) in str(error) else 43
    return 0

def mapped():
    with open("/proc/self/maps") as maps:
        return 1 if "rl_buffer:rows" in maps.read() else 44

assert status_of(mapped) == 44
assert status_of(touch) == -signal.SIGSEGV
assert status_of(check) == 42
assert array[0] == 7
with open("/proc/self/maps") as maps:
    assert "rl_buffer:rows" in maps.read()
"""


def test_a_forked_child_has_no_mapping_and_its_guard_says_so():
    ended = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr


def test_a_guard_passes_in_its_own_process(monkeypatch):
    guard = ProcessGuard()
    guard.check()
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with pytest.raises(
        ForkedClient, match=r"not to its forked child 1; call rl_buffer.connect\(address\) in the child"
    ):
        guard.check()


# ---- files -------------------------------------------------------------------------------------------------------


def test_what_was_written_into_a_file_is_there_for_the_next_who_opens_it(tmp_path):
    first = FileSegment(tmp_path / "rows", NBYTES)
    assert not first.array("uint8").any()
    first.array("int64")[:] = np.arange(NBYTES // 8)
    first.close()
    del first
    again = FileSegment(tmp_path / "rows", NBYTES)
    assert (again.array("int64") == np.arange(NBYTES // 8)).all()
    client = Segment(again.fd, NBYTES, writable=True, sealed=False)
    client.array("int64")[0] = -1
    assert again.array("int64")[0] == -1
    again.close()


def test_a_file_is_private_and_has_all_of_its_blocks(tmp_path):
    segment = FileSegment(tmp_path / "rows", 100 * NBYTES)
    status = os.stat(tmp_path / "rows")
    assert (status.st_mode & 0o777, status.st_size) == (0o600, 100 * NBYTES)
    assert status.st_blocks * 512 >= 100 * NBYTES
    segment.close()


def test_readers_cannot_map_a_readers_only_file_writable(tmp_path):
    owned = FileSegment(tmp_path / "generations", NBYTES, readers_only=True)
    with pytest.raises(PermissionError):
        Segment(owned.fd, NBYTES, writable=True, sealed=False)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(owned.fd, b"x")
    reader = Segment(owned.fd, NBYTES, writable=False, sealed=False)
    owned.array("int64")[7] = 42
    assert reader.array("int64")[7] == 42
    with pytest.raises(PermissionError):
        mprotect_writable(reader)
    owned.close()


@pytest.mark.parametrize("nbytes", [NBYTES - 8, 2 * NBYTES])
def test_a_file_of_another_size_is_refused_and_left_as_it_is(tmp_path, nbytes):
    FileSegment(tmp_path / "rows", NBYTES).close()
    before = open_descriptors()
    with pytest.raises(RLBufferError, match=f"has {NBYTES} bytes, the server promised {nbytes}"):
        FileSegment(tmp_path / "rows", nbytes)
    assert os.stat(tmp_path / "rows").st_size == NBYTES
    assert open_descriptors() == before


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_bytes(b"")
    (tmp_path / "rows").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        FileSegment(tmp_path / "rows", NBYTES)
    assert (tmp_path / "elsewhere").stat().st_size == 0
