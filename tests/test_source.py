"""What no module may do, read from the sources: look at the wall clock, or make objects of what others sent or saved.

A clock that is set must not expire anything, and whoever can write to a channel, a checkpoint or a file must not be
able to run code. Calls are recognised whatever name they were imported by.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for part in ("rl_buffer", "actors", "learner", "scripts") for path in (ROOT / part).rglob("*.py"))

# Modules whose import is forbidden, and names that are forbidden wherever they come from.
MODULES = {
    "wall clock": {"datetime", "calendar", "arrow", "pendulum"},
    "pickle": {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle"},
    "pickled functions": {"multiprocess", "multiprocessing", "torch.multiprocessing", "concurrent.futures"},
}
NAMES = {
    "wall clock": {"os.path.getmtime", "os.path.getctime", "time.CLOCK_REALTIME"},
    "pickle": {"torch.load", "torch.save", "torch.jit.load", "numpy.load", "pandas.read_pickle", "torch.package"},
    "code": {"builtins.eval", "builtins.exec", "builtins.compile", "eval", "exec", "compile", "yaml.load"},
}
ATTRIBUTES = {
    "wall clock": {"st_mtime", "st_ctime", "st_atime", "st_mtime_ns", "st_ctime_ns", "st_atime_ns"},
    "pickle": {"recv_pyobj", "send_pyobj", "allow_pickle", "weights_only", "__reduce__", "__setstate__"},
}
OF_TIME = {"monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "process_time", "thread_time"}
OF_TIME |= {"thread_time_ns", "sleep"}

ALLOWED = {
    ("learner/run_directory.py", "wall clock"): "the name of a new run's directory, which nobody compares",
    ("learner/reporters.py", "wall clock"): "the moment that TensorBoard shows beside a figure, which nobody compares",
    ("rl_buffer/launch.py", "pickled functions"): "a parent hands its own children their functions",
    ("scripts/benchmarks/trainer.py", "pickled functions"): "likewise, to measure what that costs",
}


def forbidden_in(source):
    """{(line, kind, name)}"""
    return set(_forbidden(ast.parse(source)))


def _forbidden(tree):
    full_names = {}  # as the module calls it -> as it is called where it is from
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
            for alias in node.names:
                full_names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            imported = [f"{node.module}.{alias.name}" for alias in node.names]
            full_names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        else:
            continue
        for name in imported:
            for kind, modules in MODULES.items():
                if any(name == module or name.startswith(f"{module}.") for module in modules):
                    yield node.lineno, kind, name
            yield from _judged(node, name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield from _judged(node, _full_name(node, full_names))
            yield from ((node.lineno, kind, node.attr) for kind, names in ATTRIBUTES.items() if node.attr in names)
        elif isinstance(node, ast.Name):
            yield from _judged(node, full_names.get(node.id, node.id))
        elif isinstance(node, ast.keyword):
            yield from ((node.value.lineno, kind, node.arg) for kind, names in ATTRIBUTES.items() if node.arg in names)


def _full_name(node, full_names):
    """ "torch.jit.load" for such an attribute; "" for one of an expression."""
    if isinstance(node, ast.Attribute):
        owner = _full_name(node.value, full_names)
        return owner and f"{owner}.{node.attr}"
    return full_names.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def _judged(node, name):
    for kind, names in NAMES.items():
        if name in names:
            yield node.lineno, kind, name
    if name.startswith("time.") and name.removeprefix("time.") not in OF_TIME:
        yield node.lineno, "wall clock", name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_or_run_and_no_clock_but_a_monotonic_one_is_read(path):
    where = str(path.relative_to(ROOT))
    found = {use for use in forbidden_in(path.read_text()) if (where, use[1]) not in ALLOWED}
    assert found == set(), f"{where}: line, kind and name of what is forbidden"


def test_every_exception_is_still_needed():
    for where, kind in ALLOWED:
        assert kind in {kind for _, kind, _ in forbidden_in((ROOT / where).read_text())}, f"{where} needs no exception"


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("wall clock", "import time\ntime.time()"),
        ("wall clock", "import time as t\nt.time_ns()"),
        ("wall clock", "from time import time"),
        ("wall clock", "from time import time as monotonic\nmonotonic()"),
        ("wall clock", "import time\nnow = time.time"),
        ("wall clock", "import time\ntime.strftime('%Y')"),
        ("wall clock", "import time\ntime.clock_gettime(time.CLOCK_REALTIME)"),
        ("wall clock", "import datetime"),
        ("wall clock", "def f():\n    from datetime import datetime as d\n    return d.now()"),
        ("wall clock", "import os\nos.stat('x').st_mtime"),
        ("wall clock", "import os\nos.path.getmtime('x')"),
        ("pickle", "import pickle"),
        ("pickle", "import dill as json"),
        ("pickle", "from marshal import loads"),
        ("pickle", "import torch\ntorch.load('x')"),
        ("pickle", "import torch as th\nth.load('x', weights_only=True)"),
        ("pickle", "from torch import load as read\nread('x')"),
        ("pickle", "import torch\nread = torch.load"),
        ("pickle", "from torch import jit\njit.load('x')"),
        ("pickle", "import numpy as np\nnp.load('x')"),
        ("pickle", "from numpy import load\nload('x', allow_pickle=True)"),
        ("pickle", "socket.recv_pyobj()"),
        ("pickle", "class A:\n    def f(self):\n        return self.x.__reduce__()"),
        ("pickled functions", "import multiprocess"),
        ("pickled functions", "import multiprocessing.connection as c"),
        ("pickled functions", "from torch import multiprocessing"),
        ("pickled functions", "from concurrent.futures import ProcessPoolExecutor"),
        ("code", "x = eval('1')"),
        ("code", "exec(open('x').read())"),
        ("code", "import builtins\nbuiltins.eval('1')"),
        ("code", "f = eval"),
        ("code", "compile('1', 'x', 'eval')"),
    ],
)
def test_each_forbidden_form_is_found(kind, source):
    assert kind in {found for _, found, _ in forbidden_in(source)}


@pytest.mark.parametrize(
    "source",
    [
        "import time\ntime.monotonic(), time.perf_counter_ns(), time.sleep(1)",
        "from time import monotonic as time\ntime()",
        "network.eval()\nself.exec(1)\nre.compile('x')",
        "import json, safetensors.numpy\njson.load(f), safetensors.numpy.load(b'')",
        "import torch\nmodule.load_state_dict({}), torch.compile(f)",
        "# time.time(), pickle\n'''torch.load, eval('x')'''",
        "clock.time(), buffer.load('x'), buffer.save('x')",
    ],
)
def test_what_only_looks_like_it_is_not(source):
    assert forbidden_in(source) == set()
