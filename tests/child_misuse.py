"""What the tests run in other processes that do not keep to the rules: they scribble, flood, and never read."""

import os
import resource

import child_processes as child

import rl_buffer as rb


def scribble_after_close(address, pipe):
    """Close the client and go on writing into the rows that it holds until told to end; say how often."""
    client = rb.connect(address, 30.0, name="scribbler")
    writer = client.writer("replay", num_envs=1, chunk_size=8)
    writer.add(**child.numbered_row(5))
    writer.flush()
    rows, block = writer._outbox.reserved, writer._outbox.block
    client.close()
    pipe.send(rows.tolist())
    num_times = 0
    while not pipe.poll():
        block[rows] = -1
        num_times += 1
    pipe.recv()
    pipe.send(num_times)


def serve_with_limit(pipe, tables, num_descriptors):
    """Own a server that may open so many descriptors; say its address and process, or why there is none."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_descriptors, num_descriptors))
    server = rb.BufferServer(tables)
    try:
        server.start()
    except rb.RLBufferError as error:
        pipe.send(str(error))
        return
    pipe.send((server.address, server.pid))
    pipe.recv()
    server.stop()


def visit(address, pipe, num_clients):
    """Connect that often, write a little each time and hold rows; then close all in order, or be killed."""
    clients = [rb.connect(address, 30.0) for _ in range(num_clients)]
    writers = [client.writer("replay", num_envs=1, chunk_size=1) for client in clients]
    for writer in writers:
        writer.add(**child.numbered_row(7))
    for writer in writers:
        writer.flush()
    pipe.send("wrote")
    pipe.recv()
    for writer, client in zip(writers, clients, strict=True):
        writer.close()
        client.close()
    pipe.send("closed")
    pipe.recv()


def give_credits_and_stop(address, pipe, batch_size, prefetch):
    """Ask for batches, say so, and be stopped before any of them is read."""
    client = rb.connect(address, 30.0, name="stopped learner")
    sampler = client.sampler("replay", batch_size=batch_size, prefetch=prefetch)
    client.info()  # the server has the credits
    pipe.send("asked")
    pipe.recv()
    for _ in range(prefetch):
        sampler.sample(timeout_s=30.0)
    pipe.send("sampled")
    pipe.recv()


def serve_in_cgroup(pipe, cgroup):
    """Join a cgroup; then start servers of tables as they come, and say "serving" or why not; None ends it."""
    with open(f"{cgroup}/cgroup.procs", "w") as procs:
        procs.write(str(os.getpid()))
    pipe.send("joined")
    server = None
    while (table := pipe.recv()) is not None:
        server = rb.BufferServer({"replay": table})
        try:
            server.start()
            pipe.send(server.address)
        except rb.RLBufferError as error:
            pipe.send(error)
    if server is not None:
        server.stop()
    pipe.send("stopped")
