"""The file of a checkpoint: whole or not there, and no byte of it can change unnoticed."""

import fcntl
import json
import os
import resource
import stat

import numpy as np
import pytest
from safetensors.numpy import load_file

from rl_buffer.checkpoint_file import CheckpointReader, CheckpointWriter, Part, remove_unfinished, unfinished_path
from rl_buffer.errors import InvalidInput

ROWS = np.arange(12).reshape(4, 3)
MASSES = np.array([0.5, 1.0, 1.5, 2.0])
PARTS = {"empty": Part((0, 3), "int64"), "rows": Part((4, 3), "int64"), "masses": Part((4,), "float64")}
DESCRIPTION = {"name": "first", "integer": 2**100, "infinite": float("inf")}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint.safetensors"


def write(path, rows=ROWS, description=DESCRIPTION):
    with CheckpointWriter(path) as file:
        begin(file, description)
        file.write(rows[:1])
        file.write(rows[1:])
        file.write(MASSES)
        return file.finish()


def begin(file, description=DESCRIPTION):
    file.begin(json.dumps(description), PARTS)


def read(path):
    with CheckpointReader(path) as reader:
        return reader.description, {name: reader.array(name) for name in reader.parts}


def test_what_is_read_is_what_was_written(path):
    assert write(path) == path.stat().st_size
    description, arrays = read(path)
    assert description == DESCRIPTION
    assert {name: array.shape for name, array in arrays.items()} == {name: part.shape for name, part in PARTS.items()}
    np.testing.assert_array_equal(arrays["rows"], ROWS)
    np.testing.assert_array_equal(arrays["masses"], MASSES)
    assert os.listdir(path.parent) == [path.name]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_other_programs_can_look_into_it(path):
    write(path)
    np.testing.assert_array_equal(load_file(path)["rows"], ROWS)


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ("header", "is no checkpoint, or its header is damaged"),
        ("rows", "part 'rows' of .* is damaged: its checksum is"),
        ("masses", "part 'masses' of .* is damaged: its checksum is"),
        ("checksums", "is no checkpoint, or its header is damaged"),
    ],
)
def test_a_byte_that_changed_is_noticed_wherever_it_is_and_its_part_is_named(path, region, message):
    write(path)
    whole = path.read_bytes()
    checksums = len(whole) - 8 * (len(PARTS) + 1)
    masses = checksums - MASSES.nbytes
    rows = masses - ROWS.nbytes
    start, end = {
        "header": (0, rows),
        "rows": (rows, masses),
        "masses": (masses, checksums),
        "checksums": (checksums, len(whole)),
    }[region]
    for position in range(start, end):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(InvalidInput, match=message):
            read(path)
    path.write_bytes(whole)
    read(path)


def test_a_file_that_was_cut_short_or_is_none_is_refused(path):
    with pytest.raises(InvalidInput, match=f"there is no checkpoint at {path}: No such file"):
        CheckpointReader(path)
    write(path)
    whole = path.read_bytes()
    nested = (500_000).to_bytes(8, "little") + b"[" * 500_000
    for wrong in (whole[:-8], whole[: len(whole) // 2], whole[:7], b"", whole + b"\0", nested, b"\0" * 100):
        path.write_bytes(wrong)
        with pytest.raises(InvalidInput, match=r"is no checkpoint, or (its header is damaged|cut short)"):
            CheckpointReader(path)


def test_a_part_that_is_not_there_or_has_another_size_is_refused(path):
    write(path)
    with CheckpointReader(path) as reader:
        with pytest.raises(InvalidInput, match=r"no part 'none'; it has \['empty', 'masses', 'rows'\]"):
            reader.array("none")
        with pytest.raises(InvalidInput, match=r"part 'rows' of .* has 96 bytes, not 24"):
            reader.read_into("rows", np.zeros(3))


@pytest.mark.parametrize("num_parts", [0, 1, 2])
def test_a_writer_that_stops_half_way_leaves_what_was_there_before(path, num_parts):
    write(path)
    with CheckpointWriter(path) as file:
        if num_parts:
            begin(file, {"name": "second"})
            for piece in (ROWS, MASSES)[: num_parts - 1]:
                file.write(piece)
    assert read(path)[0] == DESCRIPTION
    assert os.listdir(path.parent) == [path.name]


def test_a_finished_one_replaces_what_was_there_before(path):
    write(path)
    write(path, rows=ROWS + 1, description={"name": "second"})
    description, arrays = read(path)
    assert description == {"name": "second"}
    np.testing.assert_array_equal(arrays["rows"], ROWS + 1)


def test_two_writers_cannot_write_to_one_path_and_the_first_is_not_harmed(path):
    with CheckpointWriter(path) as file:
        begin(file)
        with pytest.raises(InvalidInput, match="another process is writing a checkpoint to"):
            CheckpointWriter(path)
        remove_unfinished(path)
        file.write(ROWS)
        file.write(MASSES)
        file.finish()
    assert read(path)[0] == DESCRIPTION


def test_what_a_killed_writer_left_is_used_again_or_removed(path):
    for after in (lambda: write(path), lambda: remove_unfinished(path)):
        killed = CheckpointWriter(path)
        begin(killed)
        killed.write(ROWS)
        os.close(killed._fd)  # as the kernel does
        assert unfinished_path(path).stat().st_size > ROWS.nbytes
        after()
        assert os.listdir(path.parent) == [path.name]
    assert read(path)[0] == DESCRIPTION


def test_a_writer_that_comes_when_another_finishes_does_not_touch_its_checkpoint(path, monkeypatch):
    first = CheckpointWriter(path)
    begin(first)
    first.write(ROWS)
    first.write(MASSES)
    flock = fcntl.flock

    def finish_before(fd, operation):
        if unfinished_path(path).exists() and first._fd >= 0:
            first.finish()
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", finish_before)
    with CheckpointWriter(path):
        assert read(path)[0] == DESCRIPTION
    assert os.listdir(path.parent) == [path.name]


def test_a_path_that_cannot_be_a_checkpoint_is_refused(path):
    with pytest.raises(InvalidInput, match=f"there is no directory {path}/none for a checkpoint; make it first"):
        CheckpointWriter(path / "none" / "file")
    path.mkdir()
    with pytest.raises(InvalidInput, match=f"{path} is a directory; a checkpoint is one file"):
        CheckpointWriter(path)


def test_where_there_is_no_room_the_error_says_how_much_was_needed_and_nothing_is_left(path):
    nbytes = write(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes - 60, hard))
    try:
        with pytest.raises(OSError, match=rf"File too large after \d+ of the {nbytes} bytes .*; {path.parent} has"):
            write(path, rows=ROWS + 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    np.testing.assert_array_equal(read(path)[1]["rows"], ROWS)
    assert os.listdir(path.parent) == [path.name]
