"""What may import what, and what no module may do: read from the sources, in the order of rl_buffer's docstring."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import rl_buffer

ROOT = Path(rl_buffer.__file__).parent
MODULES = {path.stem: path for path in sorted(ROOT.glob("*.py")) if path.stem != "__init__"}


def listed_layers():
    """{layer: its modules in order}, from the table in the docstring."""
    table = rl_buffer.__doc__.split("modules\n", 1)[1]
    layers, layer = {}, None
    for line in table.splitlines():
        line = re.sub(r"\(.*?\)", "", line)
        if heading := re.match(r" {4}(\w+) {2,}", line):
            layer = heading[1]
            line = line[heading.end() :]
        layers.setdefault(layer, []).extend(re.findall(r"\w+", line))
    return layers


LAYERS = listed_layers()
ORDER = [module for modules in LAYERS.values() for module in modules]


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imported_names(node):
    """Full names of all that is imported anywhere in a module, functions included, TYPE_CHECKING left out."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"a relative import in line {node.lineno}"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    else:
        for child in node.orelse if is_type_checking(node) else ast.iter_child_nodes(node):
            yield from imported_names(child)


def imports_of(source):
    """(modules of rl_buffer, names from elsewhere)"""
    own, foreign = set(), set()
    for name in imported_names(ast.parse(source)):
        parts = name.split(".")
        if parts[0] == "rl_buffer":
            own.add(parts[1] if len(parts) > 1 else "__init__")
        else:
            foreign.add(parts[0])
    return own, foreign


def code_of(source):
    """The source without comments and strings."""
    skipped = (tokenize.COMMENT, tokenize.STRING)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return " ".join(token.string for token in tokens if token.type not in skipped)


def test_imports_in_functions_are_seen_and_those_for_types_are_not():
    source = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from rl_buffer.client import Client
else:
    import rl_buffer.spec
def f():
    if True:
        from rl_buffer import errors
"""
    assert imports_of(source) == ({"spec", "errors"}, {"typing"})


def test_the_docstring_lists_every_module_once():
    assert sorted(ORDER) == sorted(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down_only(module):
    own, _ = imports_of(MODULES[module].read_text())
    below = ORDER[: ORDER.index(module)]
    assert own <= set(below), f"{module} imports {sorted(own - set(below))}, which rl_buffer.__doc__ lists after it"


@pytest.mark.parametrize("module", [*LAYERS["pure"], *LAYERS["protocol"], "server_core"])
def test_what_is_below_the_processes_knows_no_clock_socket_thread_or_tensor(module):
    _, foreign = imports_of(MODULES[module].read_text())
    assert not foreign & {"time", "random", "secrets", "socket", "select", "zmq", "threading", "torch", "multiprocess"}


def test_a_function_that_arrives_pickled_is_known_to_launch_only():
    users = {module for module, path in MODULES.items() if imports_of(path.read_text())[1] & {"multiprocess"}}
    assert users <= {"launch"}


FORBIDDEN = {
    "pickle": r"\b(pickle|dill|cloudpickle|marshal|shelve|joblib|\w+_pyobj)\b|allow_pickle",
    "torch.load": r"\btorch \. load\b|\bnp \. load\b",
    "eval": r"(?<!\. )\b(eval|exec)\b \(",
    "wall clock": r"\btime \. time(_ns)?\b|\bdatetime\b|\bfrom time import\b",
}


@pytest.mark.parametrize("word", FORBIDDEN)
@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.stem)
def test_nothing_is_unpickled_and_time_is_monotonic(path, word):
    found = re.search(FORBIDDEN[word], code_of(path.read_text()))
    assert found is None, f"{path.name} uses {found[0]}"


@pytest.mark.parametrize(
    ("word", "source"),
    [
        ("pickle", "import pickle"),
        ("pickle", "socket.recv_pyobj()"),
        ("torch.load", "torch.load(f)"),
        ("eval", "x = eval('1')"),
        ("wall clock", "start = time.time()"),
    ],
)
def test_the_search_finds_what_it_forbids_in_code_and_not_in_comments(word, source):
    assert re.search(FORBIDDEN[word], code_of(source))
    assert not re.search(FORBIDDEN[word], code_of(f"# {source}\n'''{source}'''"))


LIGHT = [
    "import rl_buffer",
    "from rl_buffer.client import connect",
    "import rl_buffer.writer",
    "import rl_buffer.launch; from rl_buffer import BufferServer, Client, Prioritized, ReplayTable, StatsTracker",
]


@pytest.mark.parametrize("statement", LIGHT)
def test_an_actor_loads_neither_torch_nor_numba(statement):
    program = f"{statement}\nimport sys; print([m for m in ('torch', 'numba', 'gymnasium') if m in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.stderr) == ("[]\n", "")


def test_every_public_name_can_be_imported_and_an_unknown_one_is_refused_by_name():
    for name in rl_buffer.__all__:
        assert getattr(rl_buffer, name).__name__ == name
    assert set(dir(rl_buffer)) == set(rl_buffer.__all__)
    with pytest.raises(AttributeError, match=r"module 'rl_buffer' has no attribute 'ReplyTable'; it has .*ReplayTable"):
        rl_buffer.ReplyTable  # noqa: B018
