"""Publishing and fetching state dicts between processes: the newest version, whole, and nobody waits for anybody."""

import subprocess
import sys
import time

import child_processes as child
import numpy as np
import pytest
import torch
from child_processes import NUMBERED_SPEC

import rl_buffer as rb

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def server():
    with rb.BufferServer({"replay": rb.ReplayTable(NUMBERED_SPEC, capacity=64)}) as server:
        yield server


@pytest.fixture
def publisher(server, connect):
    return connect(server, name="publisher")


@pytest.fixture
def reader(server, connect):
    return connect(server, name="reader")


def test_a_published_network_arrives_equal_and_independent(publisher, reader):
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))  # float32, and an int64 scalar
    assert publisher.publish_parameters(network.state_dict(), "network") == 1
    version, state_dict = reader.parameters("network")
    assert version == reader.parameter_versions["network"] == 1
    assert list(state_dict) == list(network.state_dict())
    for key, tensor in network.state_dict().items():
        assert state_dict[key].dtype == tensor.dtype
        assert torch.equal(state_dict[key], tensor)
    copy = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    copy.load_state_dict(state_dict)
    state_dict["0.weight"].zero_()  # a copy: nobody else sees this
    assert torch.equal(reader.parameters("network")[1]["0.weight"], network[0].weight)


def test_only_a_newer_version_than_ones_own_is_fetched(publisher, reader):
    assert reader.parameters("steps") == (0, None)
    for number in range(1, 8):  # more than there are slots
        assert publisher.publish_parameters({"w": torch.full((2,), float(number))}, "steps") == number
        assert reader.parameters("steps", newer_than=number) == (number, None)
        version, state_dict = reader.parameters("steps", newer_than=number - 1)
        assert (version, state_dict["w"].tolist()) == (number, [number, number])
    assert reader.parameters("steps", newer_than=0, as_numpy=True)[1]["w"].tolist() == [7.0, 7.0]
    assert reader.info()["parameters"]["steps"] == 7


def test_waiting_ends_at_the_deadline_or_with_the_next_version(server, reader, children, pipe, receive):
    for newer_than in (0, 1):  # before there is any, and after the first
        started_s = time.monotonic()
        assert reader.parameters(newer_than=newer_than, timeout_s=0.1) == (newer_than, None)
        assert 0.1 <= time.monotonic() - started_s < 5.0
        here, there = pipe()
        children.start(f"publisher-{newer_than}", child.publish_once, server.address, there, float(newer_than))
        version, state_dict = reader.parameters(newer_than=newer_than, timeout_s=30.0)
        assert (version, state_dict["w"].tolist()) == (newer_than + 1, [newer_than] * 3)
        assert receive(here, children) == newer_than + 1


def test_two_publishers_take_turns(server, publisher, connect):
    other = connect(server)
    versions = []
    for number in range(6):
        client = (publisher, other)[number % 2]
        versions.append(client.publish_parameters({"w": np.full(2, number)}, "turns"))
    assert versions == [1, 2, 3, 4, 5, 6]
    assert other.parameters("turns")[1]["w"].tolist() == [5, 5]


def test_a_publisher_that_vanishes_half_way_does_not_block_the_next(
    server, publisher, reader, children, pipe, receive, eventually
):
    here, there = pipe()
    publisher.publish_parameters({"w": np.zeros(3)}, "vanished")
    children.start("half", child.publish_half, server.address, there, "vanished")
    assert receive(here, children) == "half"
    with pytest.raises(rb.RequestRefused, match="another client is publishing this parameter set"):
        publisher.publish_parameters({"w": np.ones(3)}, "vanished")
    assert reader.parameters("vanished")[1]["w"].tolist() == [0, 0, 0]
    here.send("die")

    def publish():
        try:
            return publisher.publish_parameters({"w": np.ones(3)}, "vanished")
        except rb.RequestRefused:
            return 0

    assert eventually(publish, timeout_s=2.0) == 2
    assert reader.parameters("vanished")[1]["w"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"w": np.zeros(4)}, "exist with other tensors"),
        ({"w": np.zeros(3, np.float32)}, r"float64.*float32"),
        ({"v": np.zeros(3)}, "exist with other tensors"),
        ({"w": np.zeros(3), "v": np.zeros(1)}, r"1 tensors here, 2 in the request"),
    ],
)
def test_other_tensors_under_the_same_name_are_refused(publisher, reader, second, message):
    first = publisher.publish_parameters({"w": np.arange(3.0)}, "fixed")
    with pytest.raises(rb.RequestRefused, match=message):
        publisher.publish_parameters(second, "fixed")
    with pytest.raises(rb.RequestRefused, match=message):
        reader.publish_parameters(second, "fixed")
    assert reader.parameters("fixed")[1]["w"].tolist() == [0, 1, 2]
    assert publisher.publish_parameters({"w": np.arange(3.0)}, "fixed") == first + 1


@pytest.mark.parametrize(
    ("state_dict", "message"),
    [
        ({"w": [1.0]}, r"parameters\['w'\]: expected a tensor or array, got list"),
        ({"w": torch.zeros(2, dtype=torch.bfloat16)}, r"parameters\['w'\] is bfloat16"),
        ({"w": np.zeros(2, np.complex64)}, r"complex64"),
        ({}, r"at least one"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name(publisher, reader, state_dict, message):
    with pytest.raises(rb.InvalidInput, match=message):
        publisher.publish_parameters(state_dict, "unstorable")
    assert reader.parameters("unstorable") == (0, None)


def test_an_actor_fetches_arrays_without_importing_torch(server, publisher):
    publisher.publish_parameters({"w": torch.arange(3.0)}, "arrays")
    code = """
import sys
import rl_buffer as rb
with rb.connect(sys.argv[1]) as client:
    version, arrays = client.parameters("arrays", as_numpy=True)
    with client.writer("replay", num_envs=1, chunk_size=8) as writer:
        pass
print(version, arrays["w"].tolist(), type(arrays["w"]).__name__, "torch" in sys.modules, "numba" in sys.modules)
"""
    output = subprocess.run(
        [sys.executable, "-c", code, server.address], capture_output=True, text=True, timeout=30, check=False
    )
    assert output.stdout.strip() == "1 [0.0, 1.0, 2.0] ndarray False False", output.stderr


def test_a_reader_that_is_lapped_half_way_reads_again(publisher, reader):
    def publish(number):
        return publisher.publish_parameters({key: np.full(3, number) for key in "abc"}, "lapped")

    class LappedOnce(dict):
        """The reader's view of the slots; when it comes to "b", five more versions are published."""

        laps = 0

        def __getitem__(self, key):
            if key == "b" and not self.laps:
                self.laps = 1
                for number in range(2, 7):
                    publish(number)
            return super().__getitem__(key)

    publish(1)
    assert reader.parameters("lapped")[0] == 1
    parameters = reader._parameter_sets["lapped"]
    parameters._slots = LappedOnce(parameters._slots)
    version, arrays = reader.parameters("lapped", as_numpy=True)
    assert parameters._slots.laps == 1
    assert (version, {key: array.tolist() for key, array in arrays.items()}) == (6, {key: [6, 6, 6] for key in "abc"})


def test_a_reader_under_a_fast_publisher_never_sees_a_torn_set(server, reader, children, pipe, receive):
    here, there = pipe()
    children.start("publisher", child.publish_numbers, server.address, there, "fast", 20_000)
    assert receive(here, children) == "publishing"
    version, seen = 0, set()
    deadline_s = time.monotonic() + 30.0
    while len(seen) < 500 and time.monotonic() < deadline_s:
        newer, arrays = reader.parameters("fast", newer_than=version, timeout_s=5.0, as_numpy=True)
        assert newer > version
        version = newer
        numbers = {int(number) for array in arrays.values() for number in np.unique(array)}
        assert numbers == {version}
        seen.add(version)
    assert len(seen) == 500
