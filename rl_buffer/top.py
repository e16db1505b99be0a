"""`rl-buffer top`: asks a server again and again and shows `top_screen` in a terminal; a lost one is looked for."""

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator

from rich.console import Console
from rich.live import Live
from rich.text import Text

from rl_buffer.client import Client, connect
from rl_buffer.errors import RLBufferError
from rl_buffer.top_screen import WATCHER, Screen, duration

_NAME = f"{WATCHER}top"
_RECONNECT_TIMEOUT_S = 0.3  # so that keys are answered meanwhile
_ANSWER_TIMEOUT_S = 2.0


class Watched:
    """The server at an address, whichever it is now."""

    def __init__(self, address: str, timeout_s: float) -> None:
        """Attach to the first one.

        Raises:
            RLBufferError: there is none in time, or it does not let this process in.
        """
        self.screen = Screen(address)
        self._address = address
        self._client: Client | None = connect(address, timeout_s, _NAME)
        self._client.timeout_s = min(timeout_s, _ANSWER_TIMEOUT_S)
        self._reason = ""
        self._lost_s = 0.0

    def look(self) -> str:
        """Ask once, after attaching to another server where this one was lost; return what is wrong, or ""."""
        try:
            if self._client is None:
                self._client = connect(self._address, _RECONNECT_TIMEOUT_S, _NAME)
                self._client.timeout_s = _ANSWER_TIMEOUT_S
            self.screen.update(self._client.info(), self._client.tables, self._client.stats(per_client=True))
        except (RLBufferError, OSError) as error:
            if not self._reason:
                self._lost_s = time.monotonic()
                self._reason = type(error).__name__
            self.close()
            return f"no server for {duration(time.monotonic() - self._lost_s)} ({self._reason}); looking for one"
        self._reason = ""
        return ""

    def close(self) -> None:
        """Detach."""
        client, self._client = self._client, None
        if client is not None:
            client.close()


def watch(address: str, timeout_s: float, interval_s: float, *, once: bool = False) -> None:
    """Show the server at `address` until q or Ctrl-C; where there is no terminal, or `once`, one screen.

    Raises:
        RLBufferError: there is no server in time.
    """
    console = Console()
    watched = Watched(address, timeout_s)
    with contextlib.closing(watched), contextlib.suppress(KeyboardInterrupt):
        if once or not console.is_terminal:
            trouble = watched.look()
            for line in watched.screen.lines(console.width, console.height, trouble)[:-1]:
                console.print(line, no_wrap=True, crop=True, highlight=False)
            return
        with Live(console=console, screen=True, auto_refresh=False) as live, _keys() as keys:
            page = 0
            while True:
                trouble, next_look_s = watched.look(), time.monotonic() + interval_s
                while True:
                    lines = watched.screen.lines(console.width, console.height, trouble, page)
                    live.update(Text("\n", no_wrap=True, end="").join(lines), refresh=True)
                    key = _key(keys, next_look_s - time.monotonic())
                    if key in ("q", "Q", "\x03"):
                        return
                    page += key == " "
                    if not key:
                        break


@contextlib.contextmanager
def _keys() -> Iterator[int | None]:
    """The terminal's keys one by one, without Enter and not echoed; None where there is no terminal to read."""
    if not sys.stdin.isatty():
        yield None
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    tty.setcbreak(fd)
    try:
        yield fd
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _key(fd: int | None, timeout_s: float) -> str:
    """The next key, or "" if there is none in time."""
    timeout_s = max(0.0, timeout_s)
    if fd is None:
        time.sleep(timeout_s)
        return ""
    if not select.select([fd], [], [], timeout_s)[0]:
        return ""
    return os.read(fd, 1).decode(errors="replace") or "q"  # end of file: nobody is there
