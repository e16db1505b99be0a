"""What the tests run as another user. All is imported before: he may not be allowed to read this installation."""

import os
import signal
import socket
import sys

import child_processes as child
import msgspec

import rl_buffer as rb
import rl_buffer.client
import rl_buffer.row_set
import rl_buffer.server_loop
import rl_buffer.sum_tree
import rl_buffer.writer
from rl_buffer.messages import ServerConfig, ServerStatus
from rl_buffer.tables import StatsConfig


def become(uid):
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)


def connect_as(uid, pipe, address, **options):
    """Say what `rl_buffer.connect` raises, or the error's name and text."""
    become(uid)
    try:
        with rb.connect(address, 10.0, **options) as client:
            pipe.send(("connected", client.size("replay")))
    except rb.RLBufferError as error:
        pipe.send((type(error).__name__, str(error)))


def write_as(uid, pipe, address):
    """Write, hold rows, and wait to be killed."""
    become(uid)
    client = rb.connect(address, 30.0, name="guest")
    writer = client.writer("replay", num_envs=1, chunk_size=4)
    for number in range(8):
        writer.add(**child.numbered_row(number))
    writer.flush()
    pipe.send("wrote")
    signal.pause()


def greet_control_as(uid, pipe, path):
    """Connect to the zmq socket itself, and send what its server says first: nothing if it hangs up."""
    become(uid)
    with socket.socket(socket.AF_UNIX) as control:
        control.settimeout(10.0)
        control.connect(path)
        pipe.send(control.recv(10))


def serve_as(uid, pipe, address, tables, allowed_uids):
    """Serve until ended, in this very process."""
    config = ServerConfig(address, tables, StatsConfig(), os.getppid(), allowed_uids=tuple(allowed_uids))
    (configuration, to_it), (from_it, said) = os.pipe(), os.pipe()
    os.write(to_it, msgspec.json.encode(config) + b"\n")
    os.dup2(configuration, sys.stdin.fileno())
    sys.stdin = os.fdopen(configuration)
    sys.stdout = os.fdopen(said, "w")
    become(uid)
    pid = os.fork()
    if pid == 0:
        while not msgspec.json.decode(os.read(from_it, 4096).splitlines()[-1], type=ServerStatus).ready:
            pass
        pipe.send("serving")
        os._exit(0)
    rl_buffer.server_loop.main()
