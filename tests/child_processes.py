"""What the tests run in other processes. Nothing here imports pytest or torch, so that a child is there at once."""

import os
import signal
import time

import numpy as np

import rl_buffer as rb
from rl_buffer import failpoints, messages

WIDTH = 256  # int64 numbers per observation: wide enough that a gather takes a while
NUMBERED_SPEC = rb.TransitionSpec(
    obs=rb.Field((WIDTH,), "int64"), action=rb.Field((), "int64"), extras={"checksum": rb.Field((), "int64")}
)


def numbered_row(number, num_envs=1):
    """Arguments of `add` that all follow from one number, with a checksum over them."""
    obs = np.full((num_envs, WIDTH), number)
    return {
        "obs": obs,
        "action": np.full(num_envs, number * 7),
        "reward": np.full(num_envs, number % 1000),
        "done": np.zeros(num_envs),
        "next_obs": obs + 1,
        "extras": {"checksum": np.full(num_envs, checksum(number))},
    }


def checksum(number):
    return 2 * number * WIDTH + WIDTH + number * 7 + number % 1000


def write_numbers(address, pipe, count, start=0, chunk_size=8, num_envs=1, table="replay"):
    """Write rows `start`, `start` + 1, ...; `count` None: until killed. Says "ready" before and "done" after."""
    with rb.connect(address, 30.0, name=f"writer-{start}") as client:
        writer = client.writer(table, num_envs=num_envs, autoreset=None, chunk_size=chunk_size)
        pipe.send("ready")
        number = start
        while count is None or number < start + count:
            writer.add(**numbered_row(number, num_envs))
            number += 1
        writer.close()
        pipe.send("done")
        pipe.recv()  # stay until the test has looked


def write_episodes(address, pipe, table, seed, num_steps, mode):
    """Play deterministic environments and send what should be in the table."""
    from episode_envs import EpisodeEnvs, expected_rows

    with rb.connect(address, 30.0) as client:
        envs = EpisodeEnvs(2, mode, seed)
        writer = client.writer(table, envs=envs, chunk_size=8)
        rng = np.random.default_rng(seed)
        obs, _ = envs.reset()
        for _ in range(num_steps):
            actions = rng.integers(1000, size=2)
            next_obs, rewards, terminated, truncated, infos = envs.step(actions)
            writer.add(obs, actions, rewards, terminated | truncated, next_obs, truncated, terminated, infos=infos)
            obs = next_obs
        writer.close()
        pipe.send((expected_rows(envs.steps, client.tables[table].n_step), envs.finished))


def write_half(address, pipe, table="replay"):
    """Fill the first half of a chunk's rows with garbage, say so, and go on when told to."""
    with rb.connect(address, 30.0, name="half") as client:
        writer = client.writer(table, num_envs=1, chunk_size=8)
        copy_rows = writer._history.copy_rows

        def copy_half_first(windows, views, rows):
            for path in ("observations", "actions"):
                views[path][rows[: len(rows) // 2]] = -1
            pipe.send("half")
            pipe.recv()
            copy_rows(windows, views, rows)

        writer._history.copy_rows = copy_half_first
        for number in range(8):
            writer.add(**numbered_row(1_000_000 + number))
        writer.close()
        pipe.send("done")


def hold_rows(address, pipe, *, close_socket):
    """Hold reserved rows, with or without the attach connection, until told to end."""
    client = rb.connect(address, 30.0, name="holder")
    writer = client.writer("replay", num_envs=1, chunk_size=8)
    writer.add(**numbered_row(5))
    writer.flush()
    if close_socket:
        client.close()
    pipe.send("holding")
    pipe.recv()


def hold_rows_and_tell_token(address, pipe):
    """Hold reserved rows until told to end, and say by what the server knows this process."""
    client = rb.connect(address, 30.0)
    writer = client.writer("n1", num_envs=1)
    client.size("n1")
    pipe.send(client._connection.token)
    pipe.recv()
    writer.close()


def visit_often(address, pipe, num_clients):
    """Connect several times, write a little each time, hold rows and vanish without a word."""
    clients = []
    for _ in range(num_clients):
        client = rb.connect(address, 30.0)
        writer = client.writer("replay", num_envs=1, chunk_size=1)
        for number in range(12):
            writer.add(**numbered_row(number))
        clients.append((client, writer))
    pipe.send("wrote")
    pipe.recv()
    os.kill(os.getpid(), signal.SIGKILL)


def publish_numbers(address, pipe, name, num_elements):
    """Publish sets whose arrays all hold the version's own number, until killed."""
    with rb.connect(address, 30.0) as client:
        number = 0
        while True:
            number += 1
            arrays = {key: np.full(num_elements, number, "int64") for key in ("a", "b", "c")}
            client.publish_parameters(arrays, name)
            if number == 1:
                pipe.send("publishing")


def publish_half(address, pipe, name):
    """Reserve a parameter slot, fill it with garbage, and die."""
    client = rb.connect(address, 30.0)
    client.parameters(name)
    slot = client._call(messages.ReserveParameters(name)).slot
    client._parameter_sets[name].write(slot, {"w": np.full(3, -1.0)})
    pipe.send("half")
    pipe.recv()
    os.kill(os.getpid(), signal.SIGKILL)


def publish_once(address, pipe, value):
    """Publish one version and tell which it was."""
    with rb.connect(address, 30.0) as client:
        pipe.send(client.publish_parameters({"w": np.full(3, value)}))


def use_after_fork(address, pipe):
    """Fork with an open client; send what each call of the child raised."""
    client = rb.connect(address, 30.0)
    writer = client.writer("replay", num_envs=1, chunk_size=8)
    sampler = client.sampler("replay", batch_size=4)
    writer.add(**numbered_row(0))
    writer.flush()
    batch = sampler.sample()
    client.publish_parameters({"w": np.zeros(3)})
    calls = {
        "info": client.info,
        "add": lambda: writer.add(**numbered_row(1)),
        "flush": writer.flush,
        "sample": sampler.sample,
        "update_priorities": lambda: sampler.update_priorities(batch, np.ones(4)),
        "parameters": client.parameters,
        "publish": lambda: client.publish_parameters({"w": np.zeros(3)}),
        "writer": lambda: client.writer("replay", num_envs=1),
        "reconnect": client.reconnect,
    }
    pid = os.fork()
    if pid == 0:
        raised = {}
        for name, call in calls.items():
            try:
                call()
                raised[name] = "nothing"
            except Exception as error:
                raised[name] = type(error).__name__
        with rb.connect(address, 30.0) as own:  # the way out that the error names
            raised["connect"] = str(own.size("replay"))
        client.close()
        pipe.send(raised)
        os._exit(0)
    os.waitpid(pid, 0)
    writer.add(**numbered_row(2))  # the parent is as before
    writer.flush()
    pipe.send(client.size("replay"))


def stop_with_forked_child(pipe, tables):
    """Stop a server while a forked child holds copies of all pipes to it; tell how long that took."""
    server = rb.BufferServer(tables).start()
    forked = os.fork()
    if forked == 0:
        signal.pause()
    directory, started_s = server.address.removeprefix("ipc://"), time.monotonic()
    server.stop(timeout_s=10.0)
    stopped_s = time.monotonic() - started_s
    os.kill(forked, signal.SIGKILL)
    pipe.send((stopped_s, not os.path.exists(directory)))


def serve_and_wait(pipe, address, tables):
    """Own a server, with a forked child that inherits every descriptor, until killed."""
    server = rb.BufferServer(tables, address).start()
    forked = os.fork()
    if forked == 0:
        signal.pause()
    pipe.send((server.pid, forked))
    signal.pause()


def hold_rollouts(address, pipe, table, num_fragments):
    """Take fragments and keep them until killed."""
    reader = rb.connect(address).rollouts(table)
    rollouts = reader.take(num_fragments, timeout_s=30.0)
    pipe.send(rollouts.num_fragments)
    time.sleep(600)


def hold_fragment(address, pipe, table, num_envs):
    """Begin a fragment, write one step, and keep it until killed."""
    writer = rb.connect(address).rollout_writer(table, autoreset=None)
    writer.begin(timeout_s=30.0)
    zeros = [0.0] * num_envs
    writer.add(np.zeros((num_envs, 3)), [0] * num_envs, zeros, [False] * num_envs, zeros, zeros)
    pipe.send("holding")
    time.sleep(600)


def write_pairs(address, pipe, first_number, tables):
    """Write rows `first_number`, ... first to one table, then to the other, until killed; each is an episode."""
    with rb.connect(address, 30.0) as client:
        writers = [client.writer(table, num_envs=1, autoreset=None, chunk_size=8) for table in tables]
        number = first_number
        while True:
            for writer in writers:
                for i in range(8):
                    writer.add(**numbered_row(number + i) | {"done": np.ones(1)})
                writer.flush()
            number += 8
            if number == first_number + 8:
                pipe.send("writing")


def write_through_kills(address, pipe, first_number, name=""):
    """Write rows `first_number`, ..., an episode each, with whichever server there is, until told to stop.

    Says how many are acknowledged, and at last how many there are.
    """
    client = rb.connect(address, 60.0, name=name)
    writer = client.writer("replay", num_envs=1, autoreset=None, chunk_size=8)
    number = acknowledged = 0
    while not pipe.poll():
        try:
            writer.add(**numbered_row(first_number + number) | {"done": np.ones(1)})
            number += 1
        except rb.ServerLost:
            client.reconnect(60.0)
        if writer.num_acknowledged != acknowledged:
            acknowledged = writer.num_acknowledged
            pipe.send(acknowledged)
    writer.close()
    pipe.send(("wrote", number))


def write_half_of_a_chunk(address, pipe, first_number):
    """Fill half of a chunk's rows, say so, and when told to go on commit it with whichever server there is."""
    client = rb.connect(address, 60.0)
    writer = client.writer("replay", num_envs=1, autoreset=None, chunk_size=8)
    copy_rows = writer._history.copy_rows

    def copy_half_first(items, views, rows):
        copy_rows(items[: len(items) // 2], views, rows[: len(rows) // 2])
        pipe.send("half")
        pipe.recv()
        copy_rows(items, views, rows)

    writer._history.copy_rows = copy_half_first
    for number in range(8):
        writer.add(**numbered_row(first_number + number))
    writer._history.copy_rows = copy_rows
    try:
        writer.close()
    except rb.ServerLost:
        client.reconnect()
        writer.close()
    pipe.send("done")


def take_until_killed(address, pipe, table, batch_size, failpoint):
    """Take batches, saying the numbers of each, as far as a failpoint."""
    sampler = rb.connect(address, 30.0, name="victim").sampler(table, batch_size, prefetch=0)
    failpoints.arm(failpoint)
    while True:
        pipe.send((sampler.sample(timeout_s=30.0).actions // 7).tolist())


def prefetch_and_wait(address, pipe, table, batch_size):
    """Take one batch, say its numbers, and keep three that come ahead until killed."""
    sampler = rb.connect(address, 30.0, name="prefetcher").sampler(table, batch_size, prefetch=3)
    pipe.send((sampler.sample(timeout_s=30.0).actions // 7).tolist())
    time.sleep(600)
