"""SIGSTOP at every step of a client, while everything goes round several times, then SIGCONT: nothing that is there
changes, and the client goes on. It writes then into rows that it was stopped in, or reads what was overwritten.

A writer that is stopped half-way through its chunk, step by step, is in test_faults.
"""

import os
import signal
from pathlib import Path

import pytest
from soak_site import CAPACITY, ONCE, PRELOAD, TABLES, VICTIMS, Children, eventually, open_site

from rl_buffer.failpoints import FAILPOINTS
from scripts.soaking.clients import ROLLOUTS

pytestmark = pytest.mark.timeout(120)

NUM_LAPS = 3
STEPS = [name for name in FAILPOINTS if name.partition(".")[0] in VICTIMS and name != "writer.closing"]


@pytest.fixture(scope="module")
def group():
    with Children(PRELOAD) as group:
        yield group


@pytest.fixture(scope="module")
def site(tmp_path_factory, group):
    with open_site(tmp_path_factory.mktemp("board"), group) as site:
        yield site


def is_stopped(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def counts(site):
    """What must grow by how much until everything has gone round: transitions, fragments, and the parameters' slots."""
    info = site.client.info()
    fresh, rollouts = info["tables"]["fresh"]["inserts"], info["tables"][ROLLOUTS]["samples"]
    laps = NUM_LAPS * CAPACITY, NUM_LAPS * TABLES[ROLLOUTS].num_fragments, NUM_LAPS * 4
    return [*zip((fresh, rollouts, info["parameters"].get("policy", 0)), laps, strict=True)]


def wait_for_laps(site, *, of_parameters):
    before = counts(site)[: 3 if of_parameters else 2]
    try:
        eventually(lambda: all(now[0] - then >= laps for (then, laps), now in zip(before, counts(site), strict=False)))
    except AssertionError as error:
        raise AssertionError(f"from (count, wanted more) {before} to {counts(site)}: {site.client.info()}") from error


def test_there_is_a_step_to_stop_at():
    assert "writer.half_written" in STEPS


@pytest.mark.parametrize("step", STEPS)
def test_a_client_that_is_stopped_anywhere_for_several_laps_goes_on_and_harms_nothing(site, step):
    role, options = VICTIMS[step.partition(".")[0]]
    number, pid = site.start(role, options, f"{step}:{1 if any(part in step for part in ONCE) else 5}:SIGSTOP")
    eventually(lambda: is_stopped(pid))
    # While a publisher holds a slot, there are no new versions.
    holds_a_slot = step in ("publisher.reserved", "publisher.half_written", "publisher.written")
    wait_for_laps(site, of_parameters=not holds_a_slot)
    held = site.look()
    if step.startswith("writer.") and step not in ("writer.opened", "writer.acknowledged"):
        assert number not in held or step == "writer.committed"  # it all went round
    os.kill(pid, signal.SIGCONT)
    site.wait_for_success([number])
    site.look()
    site.command(number, "stop")
    assert site.exit_code_of(number) == 0
    high, slot = site.look().get(number, (0, 0))[1], site.board.slot(number)
    assert role != "writer" or slot["acknowledged"] == slot["sent"]  # all of it landed,
    assert role != "writer" or high in (0, slot["sent"])  # and is the last of it, or all went round again
    site.wait_for_success(site.bystanders.values())
    assert site.board.problems() == []


@pytest.mark.parametrize("has_directory", [True, False])
def test_a_writer_that_was_stopped_while_its_server_was_replaced_sends_its_rows_again_and_harms_nothing(
    tmp_path, group, has_directory
):
    # In a directory the next server has the same rows, into which the writer writes on before it learns of anything.
    options = {"directory": tmp_path / "tables"} if has_directory else {}
    (tmp_path / "board").mkdir()
    with open_site(tmp_path / "board", group, address=f"ipc://{tmp_path}/server", **options) as site:
        role, options = VICTIMS["writer"]
        number, pid = site.start(role, options, "writer.half_written:9:SIGSTOP")
        eventually(lambda: is_stopped(pid))
        site.replace_server()
        wait_for_laps(site, of_parameters=True)
        site.look(all_epochs=has_directory)
        os.kill(pid, signal.SIGCONT)
        site.wait_for_success([number])
        site.command(number, "stop")
        assert site.exit_code_of(number) == 0
        high, slot = site.look(all_epochs=has_directory).get(number, (0, 0))[1], site.board.slot(number)
        assert slot["acknowledged"] == slot["sent"]
        assert high in (0, slot["sent"])  # 0: all went round again
        assert site.board.slot(number)["reconnects"] == 1
        assert site.board.problems() == []
