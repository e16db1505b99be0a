"""`ProcessGroup`: children start cheaply, what kills them reaches the parent, and none is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from select import select

import multiprocess
import pytest

import rl_buffer as rb
from rl_buffer.launch import ProcessGroup

pytestmark = pytest.mark.timeout(60)


def ended(children, eventually):
    """The only child that ends."""
    (one,) = eventually(children.reap)
    return one


def pidfd_ends(pidfd, timeout_s=30.0):
    return bool(select([pidfd], [], [], timeout_s)[0])


def test_the_traceback_of_a_failing_child_reaches_the_parent(children, eventually):
    def fail_inside(number):
        raise ValueError(f"the number was {number}")

    pid = children.start("actor-3", fail_inside, 42)
    child = ended(children, eventually)
    assert (child.name, child.pid, child.exit_code) == ("actor-3", pid, 1)
    assert "in fail_inside" in child.traceback
    assert str(child).startswith(f"actor-3 (pid {pid}) ended with exit code 1\nTraceback")
    assert str(child).endswith("ValueError: the number was 42")
    assert children.pids == {}
    assert children.reap() == []


def test_a_traceback_longer_than_a_pipe_holds_does_not_block_the_child(children, eventually):
    def fail_at_length():
        raise ValueError("x" * 1_000_000 + " the end")

    children.start("child", fail_at_length)
    assert str(ended(children, eventually)).endswith("x the end")


def test_a_killed_child_is_reported_by_its_signal(children, pipe, receive, eventually):
    here, there = pipe()

    def wait(end):
        end.send("ready")
        signal.pause()

    pid = children.start("learner", wait, there)
    assert receive(here, children) == "ready"
    assert children.reap() == []
    assert children.pids == {"learner": pid}
    os.kill(pid, signal.SIGKILL)
    assert str(ended(children, eventually)) == f"learner (pid {pid}) was killed by SIGKILL"


@pytest.mark.parametrize("code", [0, 3])
def test_a_child_that_exits_by_itself_is_no_failure_of_its_own_words(children, eventually, code):
    def leave(code):
        raise SystemExit(code)

    pid = children.start("child", leave, code)
    assert str(ended(children, eventually)) == f"child (pid {pid}) ended with exit code {code}"


def test_lambdas_and_closures_work_as_targets(children, pipe, receive):
    here, there = pipe()
    factor = 6
    children.start("lambda", lambda end, make: end.send(make(7) * factor), there, lambda x: x)
    assert receive(here, children) == 42


def test_a_child_runs_with_one_thread_and_the_parents_environment_is_as_before(children, pipe, receive):
    here, there = pipe()
    before = dict(os.environ)

    def tell(end):
        end.send({name: value for name, value in os.environ.items() if name.endswith("_NUM_THREADS")})

    children.start("child", tell, there)
    variables = receive(here, children)
    assert {"OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"} <= variables.keys()
    assert set(variables.values()) == {"1"}
    assert dict(os.environ) == before


def test_a_name_is_given_to_one_child_at_a_time(children, pipe, receive, eventually):
    here, there = pipe()
    children.start("child", lambda end: end.recv(), there)
    with pytest.raises(rb.InvalidInput, match="'child' was started and not reaped"):
        children.start("child", lambda: None)
    here.send("end")
    assert ended(children, eventually).exit_code == 0
    children.start("child", lambda: None)
    assert ended(children, eventually).exit_code == 0


TRAINER = """
import os, signal, sys, time
import beside
from rl_buffer.launch import ProcessGroup

print("imported as", __name__)
{on_import}

def tell():
    print("the forkserver imported beside:", beside.importer == os.getppid())

if __name__ == "__main__":
    with ProcessGroup({preload}) as group:
        for number in range(3):
            group.start(f"child-{{number}}", tell)
        ended, deadline_s = [], time.monotonic() + 30
        while len(ended) < 3:
            ended += group.reap()
            assert time.monotonic() < deadline_s
        print("exit codes:", *(child.exit_code for child in ended))
"""


@pytest.fixture
def run_trainer(tmp_path):
    """Run a script with a module beside it and with three children; return its lines, sorted, and its errors."""

    def run(preload, on_import=""):
        (tmp_path / "beside.py").write_text("import os; importer = os.getpid()")
        script = tmp_path / "trainer.py"
        script.write_text(TRAINER.format(preload=preload, on_import=on_import))
        # Buffered: then a child could print what is left in a buffer that it got from the forkserver.
        environment = os.environ | {"PYTHONPATH": str(Path(rb.__file__).parents[1]), "PYTHONUNBUFFERED": ""}
        ended = subprocess.run(
            [sys.executable, str(script)], cwd="/", env=environment, capture_output=True, text=True, timeout=50
        )
        return sorted(ended.stdout.splitlines()), ended.stderr

    return run


@pytest.mark.parametrize("on_import", ["", "os.kill(os.getpid(), signal.SIGINT) if __name__ != '__main__' else None"])
def test_a_script_is_imported_once_for_all_children_and_ctrl_c_meanwhile_is_for_the_parent(run_trainer, on_import):
    lines, errors = run_trainer(["__main__"], on_import)
    assert lines == [
        "exit codes: 0 0 0",
        "imported as __main__",
        "imported as __mp_main__",
        *["the forkserver imported beside: True"] * 3,
    ]
    assert errors == ""


@pytest.mark.parametrize(("preload", "imported"), [(["beside"], True), ([], False)])
def test_a_module_beside_the_script_is_imported_once_if_asked_and_the_script_by_every_child(
    run_trainer, preload, imported
):
    lines, errors = run_trainer(preload)
    assert lines == [
        "exit codes: 0 0 0",
        "imported as __main__",
        *["imported as __mp_main__"] * 3,
        *[f"the forkserver imported beside: {imported}"] * 3,
    ]
    assert errors == ""


@pytest.mark.parametrize(("failure", "num_tracebacks"), [("raise OSError('only once')", 3), ("sys.exit()", 0)])
def test_a_script_that_cannot_be_imported_again_fails_in_every_child(run_trainer, failure, num_tracebacks):
    lines, errors = run_trainer(["__main__"], f"if __name__ != '__main__': {failure}")
    assert lines[0] == "exit codes: 1 1 1"
    assert errors.count("OSError: only once") == num_tracebacks


IMPATIENT_TRAINER = """
import os, select, sys
from rl_buffer.launch import ProcessGroup

if __name__ == "__main__":
    os.mkfifo(os.environ["FIFO"])
    fifo = os.open(os.environ["FIFO"], os.O_RDWR)
    with ProcessGroup(["imported"]):
        print(select.select([fifo], [], [], 30)[0] == [fifo])
"""


def test_entering_a_group_begins_its_imports_before_anything_is_started(tmp_path):
    (tmp_path / "trainer.py").write_text(IMPATIENT_TRAINER)
    (tmp_path / "imported.py").write_text("import os; open(os.environ['FIFO'], 'w').write('here')")
    environment = os.environ | {"PYTHONPATH": str(Path(rb.__file__).parents[1]), "FIFO": str(tmp_path / "fifo")}
    command = [sys.executable, str(tmp_path / "trainer.py")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50)
    assert (ended.stdout, ended.stderr) == ("True\n", "")


def test_a_forkserver_that_was_killed_is_replaced_by_another_like_it(children, pipe, receive):
    told = []
    for name in ("before", "after"):
        here, there = pipe()
        children.start(name, lambda end: end.send((os.getppid(), os.environ["OMP_NUM_THREADS"])), there)
        told.append(receive(here, children))
        pidfd = os.pidfd_open(told[-1][0])
        os.kill(told[-1][0], signal.SIGKILL)
        assert pidfd_ends(pidfd)
        os.close(pidfd)
    (before, num_threads), after = told
    assert after[0] != before
    assert after[1] == num_threads == "1"


def ignore_signals(end):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end.send("ready")
    while True:
        signal.pause()


def wait_for_signal(end):
    end.send("ready")
    signal.pause()


def test_stop_ends_all_within_its_deadline_even_one_that_ignores_it_and_one_that_is_stopped(pipe, receive):
    group, pidfds = ProcessGroup(), []
    for name, target in (("deaf", ignore_signals), ("stopped", wait_for_signal), ("polite", wait_for_signal)):
        here, there = pipe()
        pid = group.start(name, target, there)
        assert receive(here, group) == "ready"
        pidfds.append(os.pidfd_open(pid))
        if name == "stopped":
            os.kill(pid, signal.SIGSTOP)
    started_s = time.monotonic()
    group.stop(timeout_s=0.5)
    assert time.monotonic() - started_s < 5.0
    for pidfd in pidfds:
        assert pidfd_ends(pidfd, 0)
        os.close(pidfd)
    assert group.pids == {}
    group.stop()


def test_ctrl_c_is_for_the_parent_alone(children, pipe, receive):
    here, there = pipe()

    def answer(end):
        while True:
            end.send(end.recv())

    pid = children.start("child", answer, there)
    here.send("before")
    assert receive(here, children) == "before"
    os.kill(pid, signal.SIGINT)
    here.send("after")
    assert receive(here, children) == "after"


def become_parent(end, children_ends):
    group = ProcessGroup()
    end.send([group.start(f"child-{i}", ignore_signals, child_end) for i, child_end in enumerate(children_ends)])
    signal.pause()


def test_children_end_when_their_parent_is_killed(children, pipe, receive):
    # The parent of these is a plain process: daemonic ones, which ProcessGroup starts, may have no children.
    here, there = pipe()
    pipes = [pipe() for _ in range(2)]
    parent = multiprocess.get_context("spawn").Process(target=become_parent, args=(there, [end for _, end in pipes]))
    parent.start()
    pids = receive(here)
    for end, _ in pipes:
        assert receive(end) == "ready"
    pidfds = [os.pidfd_open(pid) for pid in pids]
    os.kill(parent.pid, signal.SIGKILL)
    for pidfd in pidfds:
        assert pidfd_ends(pidfd), "a child outlived its parent"
        os.close(pidfd)
    parent.join(10.0)
    parent.close()
