"""Every error that rl_buffer raises on purpose.

A message says what came, what was expected and what to do. Each class also derives from the built-in
exception that a caller would expect, so `except ValueError` works as well as `except rl_buffer.InvalidInput`.
"""


class RLBufferError(Exception):
    """Base of all errors of this package."""


class InvalidInput(RLBufferError, ValueError):
    """An argument has the wrong shape, dtype, range or name. Nothing has changed."""


class DeadlineExceeded(RLBufferError, TimeoutError):
    """A wait reached its deadline; the message says what for and on whom. Nothing has changed."""


class ServerLost(RLBufferError, ConnectionError):
    """The server ended or was killed. `Client.reconnect` goes on with the next one at its address."""


class ConnectionRefused(RLBufferError, ConnectionError):
    """The server does not let this process in: other user, other protocol version, too many clients."""


class RequestRefused(RLBufferError):
    """The server refused a request as a whole; its state is as before. The message is the server's."""


class AddressInUse(RLBufferError, OSError):
    """Another live server owns this address."""


class NotEnoughMemory(RLBufferError, MemoryError):
    """The tables do not fit: the message says need, have and what to do."""


class ForkedClient(RLBufferError, RuntimeError):
    """A client was used in a forked child. Connect again in the child."""


class Closed(RLBufferError, RuntimeError):
    """This client, writer or sampler was closed before the call."""
