import os
import signal
import subprocess
import sys

import pytest

from rl_buffer import peers
from rl_buffer.peers import UNKNOWN_PROCESS, find_again, identify, readable


@pytest.fixture
def process():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def test_a_process_that_lives_is_found_again_and_seen_to_end(process):
    pidfd = find_again(identify(process.pid))
    assert not readable(pidfd, 0.0)
    os.kill(process.pid, signal.SIGKILL)
    assert readable(pidfd, 10.0)
    os.close(pidfd)


def test_a_process_that_ended_is_not_found_again(process):
    known = identify(process.pid)
    process.kill()
    process.wait()
    assert find_again(known) is None


def test_another_process_with_the_same_number_is_told_from_the_one_before():
    known = identify(os.getpid())
    assert known.started > 0
    before = len(os.listdir("/proc/self/fd"))
    assert find_again(known._replace(started=known.started + 1)) is None
    assert len(os.listdir("/proc/self/fd")) == before


def test_nothing_outlives_a_reboot():
    assert find_again(identify(os.getpid())._replace(boot=1)) is None


def test_a_process_whose_start_is_not_known_is_taken_for_the_same():
    os.close(find_again(identify(os.getpid())._replace(started=0)))


@pytest.mark.parametrize("changes", [{"namespace": 1}, {"pid": 0}])
def test_of_a_process_in_another_pid_namespace_nothing_is_known(changes):
    with pytest.raises(LookupError, match="in another PID namespace"):
        find_again(identify(os.getpid())._replace(**changes))


def test_a_name_with_parentheses_does_not_hide_when_a_process_started(tmp_path):
    link = tmp_path / "a) S 1 (b"
    link.symlink_to(sys.executable)
    process = subprocess.Popen([link, "-c", "input()"], stdin=subprocess.PIPE)
    mine = identify(os.getpid())
    try:
        assert identify(process.pid).started >= mine.started > 0
    finally:
        process.kill()
        process.communicate()


def test_the_unknown_process_is_found_nowhere(monkeypatch):
    monkeypatch.setattr(peers, "_here", lambda: (0, 0))
    with pytest.raises(LookupError):
        find_again(UNKNOWN_PROCESS)
