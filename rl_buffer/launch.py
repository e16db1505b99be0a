"""Child processes of a trainer: started cheaply, watched, and never left behind.

Children come from `multiprocess`'s forkserver (one process with the heavy imports done, forked per child), so the
functions that they run may be lambdas and closures. A child ends with its parent, however that ends; Ctrl-C is the
parent's to act on. What kills a child reaches the parent as text.
"""

import contextlib
import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import multiprocess
from multiprocess import connection as multiprocess_connection
from multiprocess import forkserver, spawn

from rl_buffer.errors import InvalidInput

THREAD_LIMIT_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
_PREPARATION_VARIABLE = "RL_BUFFER_FORKSERVER_PREPARATION"
_SCRIPT_KEYS = {"init_main_from_path", "init_main_from_name"}
_PARENT_GONE_EXIT_CODE = 75  # EX_TEMPFAIL
_MAX_TRACEBACK_NBYTES = 32 << 10  # a pipe holds 64 KiB, and nobody reads it before the child has ended


@dataclass(frozen=True, slots=True)
class Ended:
    """A child that ended although nobody asked it to."""

    name: str
    pid: int
    exit_code: int  # negative: killed by that signal
    traceback: str  # of the exception that ended it, or ""

    def __str__(self) -> str:
        if self.exit_code < 0:
            return f"{self.name} (pid {self.pid}) was killed by {signal.Signals(-self.exit_code).name}"
        return f"{self.name} (pid {self.pid}) ended with exit code {self.exit_code}\n{self.traceback}".rstrip()


class ProcessGroup:
    """Children by name.

    Args:
        preload: modules that the forkserver imports once for all children, from now on and while this process goes
            on; one that cannot be imported is left to the children. "__main__" is this process's script, which every
            child would otherwise import by itself; not for scripts that start threads or CUDA when imported.
        num_threads: of OpenMP, MKL, OpenBLAS and Numba in each child. Two processes with torch's default of two
            threads each on two cores ran an update in 9.7 ms instead of 2.
    """

    def __init__(self, preload: Sequence[str] = (), num_threads: int = 1) -> None:
        self._context = multiprocess.get_context("forkserver")
        self._context.set_forkserver_preload(["rl_buffer.preload", *(name for name in preload if name != "__main__")])
        self._preload_script = "__main__" in preload
        self._num_threads = num_threads
        self._children: dict[str, tuple[Any, Any]] = {}  # name -> (process, pipe with its traceback)

    def launch(self) -> None:
        """Launch the forkserver unless it runs. The first `start` does it too, and waits for its imports as well."""
        preparation = spawn.get_preparation_data("forkserver")
        keys = {"sys_path", "sys_argv"} | (_SCRIPT_KEYS if self._preload_script else set())
        with _environment(
            dict.fromkeys(THREAD_LIMIT_VARIABLES, str(self._num_threads))
            | {_PREPARATION_VARIABLE: json.dumps({key: preparation[key] for key in keys & preparation.keys()})}
        ):
            forkserver.ensure_running()

    def start(self, name: str, target: Callable[..., None], *args: Any) -> int:
        """Run `target(*args)` in a child called `name`; return its process id.

        Raises:
            InvalidInput: a child of that name has not been reaped.
        """
        if name in self._children:
            raise InvalidInput(f"a child called {name!r} was started and not reaped; choose another name")
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_run, args=(sender, target, args), name=name, daemon=True)
        self.launch()
        process.start()
        sender.close()
        self._children[name] = (process, receiver)
        return int(process.pid)

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of the children that have not been reaped."""
        return {name: process.pid for name, (process, _) in self._children.items()}

    def reap(self) -> list[Ended]:
        """Take the children that have ended out of the group."""
        ended = []
        for name, (process, receiver) in list(self._children.items()):
            if process.exitcode is None:
                continue
            text = ""
            with contextlib.suppress(EOFError, OSError):
                if receiver.poll():
                    text = receiver.recv_bytes().decode(errors="replace")
            receiver.close()
            del self._children[name]
            ended.append(Ended(name, int(process.pid), int(process.exitcode), text))
        return ended

    def stop(self, timeout_s: float = 2.0) -> None:
        """End all children: SIGTERM, and SIGKILL for those that are still there at the deadline."""
        for process, _ in self._children.values():
            process.terminate()
        deadline_s = time.monotonic() + timeout_s
        for process, receiver in self._children.values():
            process.join(max(0.0, deadline_s - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                process.join(timeout_s)
            receiver.close()
        self._children.clear()

    def __enter__(self) -> "ProcessGroup":
        self.launch()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """The forkserver takes its environment from the process that launches it, and its children take it from there."""
    previous = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in previous.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def prepare_forkserver() -> None:
    """Give the forkserver its parent's `sys.path`, and import its parent's script there; `rl_buffer.preload` calls it.

    Python up to 3.12 means to and does neither (gh-117378, gh-126631): modules beside a script were not preloaded, and
    every child imported the script for itself: 16 actors like those of scripts/train.py took 14.6 s and 111 MB each
    on two cores instead of 4.2 s and 24 MB (scripts/bench.py --sections startup).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as the forkserver does later, for the time of its imports
    process = multiprocess.current_process()
    process._inheriting = True  # so that a script which starts children when it is imported is told so
    with contextlib.suppress(Exception, SystemExit):  # every child tries again, and there it is seen
        spawn.prepare(json.loads(os.environ.pop(_PREPARATION_VARIABLE)))
    del process._inheriting
    print(end="", flush=True)  # or every child prints again what the script printed


def _run(sender: Any, target: Callable[..., None], args: tuple[Any, ...]) -> None:
    """First function of every child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True, name="end-with-parent").start()
    try:
        target(*args)
    except SystemExit:
        raise
    except BaseException:
        sender.send_bytes(traceback.format_exc().encode()[-_MAX_TRACEBACK_NBYTES:])
        raise SystemExit(1) from None


def _end_with_parent() -> None:
    multiprocess_connection.wait([multiprocess.parent_process().sentinel])
    os._exit(_PARENT_GONE_EXIT_CODE)
