"""Too little memory is said before it is used: a server that comes up is not killed, nor anybody who writes to it."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import child_misuse
import numpy as np
import pytest

import rl_buffer as rb

pytestmark = pytest.mark.timeout(240)

MIB, GIB = 1 << 20, 1 << 30
LIMIT_NBYTES = 1 * GIB
KEPT_FREE_NBYTES = 256 * MIB
ROW_NBYTES = 64 + 8  # of SPEC, and its generation
BOOKKEEPING_NBYTES = 64  # a row
SPEC = rb.TransitionSpec(obs=rb.Field((1,)), action=rb.Field((1,)))
TESTS = Path(__file__).parent


def table(num_rows):
    return rb.ReplayTable(SPEC, capacity=num_rows - 8, headroom=8, sampler=rb.Prioritized())


@pytest.fixture
def cgroup():
    """A cgroup of its own with LIMIT_NBYTES of memory, version 1 or 2."""
    controllers = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    version = "memory" if "memory" in controllers else ""
    group = Path("/sys/fs/cgroup", version, controllers[version].lstrip("/"), f"rl_buffer-test-{os.getpid()}")
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"this system does not let us make cgroups: {error}")
    try:
        limit = group / ("memory.limit_in_bytes" if version else "memory.max")
        if not limit.exists():
            pytest.skip(f"memory is not limited by the cgroups below {group.parent}")
        limit.write_text(str(LIMIT_NBYTES))
        yield group
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            os.kill(int(pid), signal.SIGKILL)
        with contextlib.suppress(OSError):
            group.rmdir()


@pytest.fixture
def serve_there(cgroup, children, pipe, receive, eventually):
    """Start a server of a table in that cgroup: its address, or the error."""
    here, there = pipe()
    children.start("parent", child_misuse.serve_in_cgroup, there, cgroup)
    assert receive(here, children) == "joined"

    def start(table):
        here.send(table)
        return receive(here, children)

    yield start
    here.send(None)
    assert receive(here, children) == "stopped"
    children.stop()
    eventually(lambda: not (cgroup / "cgroup.procs").read_text())


def need_and_have(error):
    """In bytes, as the message has them."""
    assert isinstance(error, rb.NotEnoughMemory), error
    found = re.search(r"need (\d+\.\d\d) GiB, and (\d+\.\d\d) GiB are available .*; lower capacity or head", str(error))
    return [float(number) * GIB for number in found.groups()]


def test_a_server_knows_the_limit_of_its_cgroup_for_rows_for_bookkeeping_and_for_parameters(serve_there, connect):
    need, have = need_and_have(serve_there(table(LIMIT_NBYTES // 36)))
    assert need > 2 * LIMIT_NBYTES
    assert LIMIT_NBYTES / 2 < have <= LIMIT_NBYTES
    # Rows that fit, with bookkeeping that does not.
    num_rows = int(0.9 * (have - KEPT_FREE_NBYTES)) // ROW_NBYTES
    need, _ = need_and_have(serve_there(table(num_rows)))
    assert need == pytest.approx(num_rows * (ROW_NBYTES + BOOKKEEPING_NBYTES), rel=0.02)
    client = connect(serve_there(table(num_rows // 2)))
    with client.writer("replay", num_envs=1, chunk_size=1) as writer:
        writer.add([1.0], [1.0], 1.0, False, [1.0])
    with pytest.raises(rb.RequestRefused, match=r"parameters 'policy' need 0\.9\d GiB, and 0\.\d\d GiB are available"):
        client.publish_parameters({"w": np.zeros(240 * MIB // 4, "float32")})  # four slots of it
    assert client.publish_parameters({"w": np.zeros(1000)}) == 1
    assert client.size("replay") == 1, "the server goes on"


FULL_SHM = """
import os
import numpy as np
import rl_buffer as rb

with open("/dev/shm/filler", "wb", buffering=0) as filler:
    try:
        while True:
            filler.write(bytes(4096))
    except OSError as error:
        print(error.strerror, os.statvfs("/dev/shm").f_bavail)

spec = rb.TransitionSpec(obs=rb.Field((1000,)), action=rb.Field((1,)))
with rb.BufferServer({"replay": rb.ReplayTable(spec, capacity=1000, headroom=1000)}) as server:
    with rb.connect(server.address) as client, client.writer("replay", num_envs=1) as writer:
        for _ in range(1500):
            writer.add(np.ones(1000), [1.0], 1.0, False, np.ones(1000))
        writer.flush()
        print(client.size("replay"))
"""


def test_a_full_dev_shm_stops_nobody():
    unshare = shutil.which("unshare")
    command = [str(unshare), "--mount", "sh", "-c", 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"', "sh"]
    if unshare is None or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("this system does not let us mount a /dev/shm of our own (unshare --mount)")
    ended = subprocess.run(
        [*command, sys.executable, "-c", FULL_SHM], capture_output=True, text=True, timeout=60, cwd=TESTS.parent
    )
    assert (ended.stdout, ended.stderr) == ("No space left on device 0\n1000\n", "")
