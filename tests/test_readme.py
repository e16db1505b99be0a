"""Everything in the README is run: its Python as it stands, its commands cut down to seconds."""

import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from rl_buffer import cli
from rl_buffer.table_file import read_tables
from rl_buffer.top_screen import _CLIENT_COLUMNS, _TABLE_COLUMNS, _columns

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
CHINESE = (ROOT / "README_zh-cn.md").read_text()
DEADLINE_S = 150.0
pytestmark = pytest.mark.timeout(180)

BOOTSTRAP = "pip install uv && "


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines()]


@pytest.mark.parametrize("block", blocks("python"))
def test_every_python_block_runs_as_it_stands(block, tmp_path):
    script = tmp_path / "block.py"
    script.write_text(block)
    result = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE_S)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def test_the_two_commands_are_complete_and_ci_runs_the_second():
    assert BOOTSTRAP + "uv run scripts/train.py" in commands()
    assert BOOTSTRAP + "uv run pytest" in commands()
    assert BOOTSTRAP + "uv run pytest\n" in (ROOT / ".ci" / "run").read_text()


def help_of(*program: str) -> str:
    """What a script says of itself."""
    known = subprocess.run([sys.executable, *program, "--help"], capture_output=True, text=True, timeout=DEADLINE_S)
    assert known.returncode == 0, known.stderr
    return known.stdout


def is_of_rl_buffer(command: str) -> bool:
    return command.startswith("uv run rl-buffer ")


def test_every_command_names_a_script_that_exists_with_options_that_it_knows():
    helps: dict[str, str] = {}
    for command in commands():
        words = shlex.split(command.removeprefix(BOOTSTRAP))
        assert words[:2] == ["uv", "run"], command
        if words[2] == "pytest" or is_of_rl_buffer(command):
            continue
        if words[2] not in helps:
            helps[words[2]] = help_of(str(ROOT / words[2]))
        for option in re.findall(r"(?<!\S)(--[a-z-]+)", command):
            assert re.search(rf"{option}\b", helps[words[2]]), f"{command}: {option} is not in --help"
    assert set(helps) == {f"scripts/{path.name}" for path in (ROOT / "scripts").glob("*.py")}


def test_every_use_of_the_installed_command_is_one_that_it_knows():
    used = set()
    for command in filter(is_of_rl_buffer, commands()):
        arguments = shlex.split(command)[3:]
        cli.parser().parse_args(arguments)  # ends the process where it does not understand
        used.add(arguments[0])
    assert used == {"serve", "top", "info", "stats", "checkpoint", "doctor"}


def test_the_tables_of_the_page_can_be_served(tmp_path):
    path = tmp_path / "tables.toml"
    for block in blocks("toml"):
        path.write_text(block)
        assert read_tables(path)["replay"].capacity == 100_000


def test_the_screen_of_the_page_has_the_columns_of_top():
    (screen,) = (block for block in blocks("text") if block.startswith("rl_buffer ipc://"))
    lines = screen.splitlines()
    assert max(map(len, lines)) <= 80
    for columns in (_TABLE_COLUMNS, _CLIENT_COLUMNS):
        assert _columns(columns, [heading for heading, _, _ in columns], 80, "").plain.rstrip() in lines


def test_every_message_of_the_troubleshooting_is_one_that_the_package_has():
    rows = README.partition("\n## Troubleshooting\n")[2].partition("\n## ")[0].splitlines()
    messages = [re.findall(r"`(.+?)`", row.split("|")[1]) for row in rows if row.startswith("| `")]
    assert len(messages) > 10
    # Without what joins the pieces of a message that is written over several lines.
    source = "".join(path.read_text() for path in sorted((ROOT / "rl_buffer").glob("**/*.py")))
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    for fragments in messages:
        for fragment in fragments:
            assert fragment in source, f"{fragment!r} is in no message"


def test_the_listing_is_what_is_there():
    listed = set(re.findall(r"^\| `(\w+)/`", README, re.MULTILINE))
    there = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    assert listed == there - {"runs", "build", "dist"}


_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]+`")


def prose(page: str) -> str:
    """The page without its fenced blocks, where a comment would look like a heading."""
    return _FENCED.sub("", page)


def headings(page: str) -> list[tuple[int, str]]:
    return [(len(marks), words) for marks, words in re.findall(r"^(#+) (.+)$", prose(page), re.MULTILINE)]


def tables(page: str) -> list[list[list[str]]]:
    """[table][row][cell] of all that stands between bars, the line under the heading included."""
    rows = re.findall(r"(?:^\|.*\|\n)+", prose(page), re.MULTILINE)
    return [[line.strip("|").split(" | ") for line in table.splitlines()] for table in rows]


def links(page: str) -> list[str]:
    return re.findall(r"\]\(([^)]+)\)", _CODE.sub("", prose(page)))


def anchors(page: str) -> set[str]:
    """What GitHub calls the headings: small letters, without punctuation, hyphens for spaces."""
    return {re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-") for _, words in headings(page)}


def figures(section: str) -> Counter[str]:
    """How often each number is there, in whatever order."""
    return Counter(re.findall(r"\d(?:[\d,.]*\d)?", _CODE.sub("", section)))


def test_the_chinese_readme_has_the_same_blocks_tables_and_headings():
    assert _FENCED.findall(CHINESE) == _FENCED.findall(README)
    assert [level for level, _ in headings(CHINESE)] == [level for level, _ in headings(README)]
    for chinese, english in zip(tables(CHINESE), tables(README), strict=True):
        assert len(chinese) == len(english), english[0]
        for row, original in zip(chinese, english, strict=True):
            assert len(row) == len(original), original
            if ".py::" in original[-1]:  # test_promises.py looks for these tests: of the one page, so of the other
                assert row[-1] == original[-1], original


def test_the_chinese_readme_has_the_same_figures_and_code_in_each_section():
    sections = (re.split(r"^#+ ", prose(page), flags=re.MULTILINE)[1:] for page in (CHINESE, README))
    for chinese, english in zip(*sections, strict=True):
        assert figures(chinese) == figures(english), english.splitlines()[0]
        assert set(_CODE.findall(chinese)) == set(_CODE.findall(english)), english.splitlines()[0]


def test_the_readmes_link_to_each_other_and_else_to_the_same_places():
    assert README.splitlines()[2] == "[中文](README_zh-cn.md)"
    assert CHINESE.splitlines()[2] == "[English](README.md)"
    assert links(CHINESE)[0] == "README.md"
    assert links(README)[0] == "README_zh-cn.md"
    for chinese, english in zip(links(CHINESE)[1:], links(README)[1:], strict=True):
        assert chinese.startswith("#") == english.startswith("#")
        assert chinese.startswith("#") or chinese == english
    for page in (README, CHINESE):
        assert {link[1:] for link in links(page) if link.startswith("#")} <= anchors(page)
        assert len(anchors(page)) == len(headings(page))
