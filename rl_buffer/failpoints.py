"""Places in the protocol where a process can be made to die or stop, so that tests see what the others make of it.

    RL_BUFFER_FAILPOINT="writer.written:3" python ...             SIGKILL at the third time that it gets there
    RL_BUFFER_FAILPOINT="writer.written:3:SIGSTOP" python ...     SIGSTOP, until somebody sends SIGCONT

Without the variable, `reached` compares two strings: 0.03 us. A process signals itself only, so whoever can set the
variable could have sent the signal anyway.
"""

import os
import signal

from rl_buffer.errors import InvalidInput

# Who, and which step was just done unless it says otherwise; in the order in which they come.
FAILPOINTS = (
    # A client comes in.
    "attach.connected",  # nothing said yet
    "attach.welcomed",  # the server counts us, nothing is mapped
    "attach.mapped",
    "client.asked",  # a request on a channel is sent, its answer not read
    # Transitions are written.
    "writer.opened",
    "writer.reserving",  # items are complete, rows perhaps not there
    "writer.reserved",
    "writer.half_written",  # one leaf of many is in the rows
    "writer.written",
    "writer.committed",  # the commit is sent
    "writer.granted",  # the next rows are here
    "writer.acknowledged",  # and the last are committed
    "writer.closing",  # everything is acknowledged, the server not told that we leave
    # Transitions are sampled.
    "sampler.opened",
    "sampler.asked",  # a credit is sent, with new priorities or without
    "sampler.received",  # row numbers are here
    "sampler.half_gathered",  # rows are copied, their generations not looked at
    "sampler.gathered",
    "sampler.updated",  # new priorities are sent
    # A table whose items leave with their last use gets them back, and a running one another limiter.
    "consumer.released",  # the server is told that they are copied, the learner has not got them
    "limiter.changed",  # and written down, but nobody was told
    # Rollouts are written.
    "rollout_writer.opened",
    "rollout_writer.began",  # a fragment is held
    "rollout_writer.half_written",  # one step of many is in the fragment
    "rollout_writer.written",  # GAE too
    "rollout_writer.committed",
    # Rollouts are read.
    "rollout_reader.opened",
    "rollout_reader.asked",
    "rollout_reader.received",  # fragments are leased
    "rollout_reader.half_copied",  # one leaf of many
    "rollout_reader.copied",
    "rollout_reader.released",
    # Parameters are published and fetched.
    "publisher.mapped",
    "publisher.reserved",  # a slot is held
    "publisher.half_written",  # one array of many
    "publisher.written",
    "publisher.published",
    "parameters.mapped",
    "parameters.half_read",  # arrays are copied, their version not looked at
    "parameters.read",
    # The server comes up.
    "server.locked",  # the address is ours
    "server.allocated",
    "server.recovering",  # the tables of a directory are as they were, the journal not disarmed
    "server.resumed",
    "server.completing",  # a new directory is, but for its name
    "server.bound",
    # It lets a client in.
    "server.accepted",
    "server.greeted",  # Hello is here
    "server.attached",  # the client has a session, and does not know it
    "server.welcomed",
    # It serves.
    "server.received",  # any frame
    "server.opened",  # a writer, sampler or reader, which does not know it
    "server.commit_checked",
    "server.noted",  # in the journal of a directory, from which it does not follow yet
    "server.armed",  # it does
    "server.half_carried_out",
    "server.carried_out",  # in the ledger
    "server.committing",  # some rows are queued as committed
    "server.evicted",  # the oldest rows are out of the sampler, their generations raised
    "server.raised",  # generations of the new ones too, which cannot be sampled yet
    "server.published",  # and sampled
    "server.acknowledging",  # a whole commit is published
    "server.granted",  # rows to a writer, which does not know it
    "server.credit_checked",
    "server.updated",  # priorities
    "server.drawn",  # a batch, which nobody got
    "server.leased",  # fragments, likewise
    "server.released",  # fragments that were read
    "server.slot_reserved",  # for parameters
    "server.parameters_published",
    "server.freeing",  # a client is gone, its rows are not free yet
    "server.freed",
    "server.answering",  # anything, before it is sent
    "server.answered",
    # A checkpoint is written: by the server,
    "checkpoint.launched",  # the process is there, and has not been told what to do
    "checkpoint.frozen",  # rows are kept for it, their numbers not handed over
    "checkpoint.handed_over",
    # and by that process.
    "checkpoint.opened",  # a file that is not finished
    "checkpoint.reserved",  # memory for the numbers
    "checkpoint.begun",  # the header
    "checkpoint.copied",  # one piece of many; the server does not know
    "checkpoint.written",  # all of it, perhaps not on the disk
    "checkpoint.synchronised",  # it is, under another name
    "checkpoint.renamed",
    "checkpoint.finished",
)

_SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP}

_armed = ""
_num_left = 0
_signal = signal.SIGKILL


def reached(name: str) -> None:
    """The process has come to this failpoint: it goes on, unless it is armed."""
    if name == _armed:
        _count_down()


def arm(failpoint: str) -> None:
    """Send a signal to oneself, once, at "NAME", "NAME:COUNT" or "NAME:COUNT:SIGNAL".

    Args:
        failpoint: COUNT is how many times from now on, 1 if it is left out; SIGNAL is SIGKILL or SIGSTOP. "" disarms.

    Raises:
        InvalidInput: it is none of these.
    """
    global _armed, _num_left, _signal
    name, count, signal_name, *rest = [*failpoint.split(":"), *("1", "SIGKILL")[failpoint.count(":") :]]
    if failpoint and (
        name not in FAILPOINTS or not count.isdecimal() or int(count) < 1 or signal_name not in _SIGNALS or rest
    ):
        raise InvalidInput(
            f"no failpoint {failpoint!r}; expected NAME:COUNT:SIGNAL, the last two or one may be left out, where "
            f"SIGNAL is of {list(_SIGNALS)} and NAME is of {FAILPOINTS}"
        )
    _armed, _num_left, _signal = name, int(count), _SIGNALS[signal_name]


def _count_down() -> None:
    global _armed, _num_left
    _num_left -= 1
    if _num_left == 0:
        _armed = ""
        os.kill(os.getpid(), _signal)


arm(os.environ.get("RL_BUFFER_FAILPOINT", ""))
