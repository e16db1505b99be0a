"""The README's table of promises: every row names tests, and every test that it names exists."""

import ast
import functools
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
SECTION = re.search(r"^## Promises\n(.*?)^## ", (TESTS.parent / "README.md").read_text(), re.MULTILINE | re.DOTALL)[1]
ROWS = [line.strip("|").split(" | ") for line in SECTION.splitlines() if line.startswith("| ")][1:]


@functools.cache
def functions_of(file):
    return {node.name for node in ast.parse((TESTS / file).read_text()).body if isinstance(node, ast.FunctionDef)}


def test_the_table_is_found():
    assert len(ROWS) > 30


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip())
def test_a_promise_is_shown_by_tests_that_exist(row):
    _fault, promise, shown_by = row
    assert promise
    named = re.findall(r"`(\w+\.py)::(\w+)`", shown_by)
    assert named
    assert not re.sub(r"`\w+\.py::\w+`(, )?", "", shown_by).strip()
    for file, test in named:
        assert test in functions_of(file)
