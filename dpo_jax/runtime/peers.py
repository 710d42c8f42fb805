"""Notices processes that end without a word: each keeps a TCP connection to process 0 open until it says that it ends.

The kernel closes the connection of a killed process, and its keep-alive packets notice a machine that is gone.
A process that is only busy answers neither sooner nor later, and is never taken for dead.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import uuid
from collections.abc import Callable
from typing import cast

GONE_S = 30  # until a machine that no longer answers counts as gone
CONNECT_S = 20  # for a connection to process 0
INDEX_DIGITS = 8
END = b"end"

Lost = Callable[[int], None]  # called with the index of a process, from a thread


class Server:
    """Waits, in process 0, for connections of the others, and calls `lost` for each that closes without a word."""

    def __init__(self, lost: Lost):
        self._lost, self._listener = lost, socket.create_server(("", 0))
        self._said: dict[socket.socket, bytes] = {}  # by connection
        self.token = uuid.uuid4().hex  # that a connection must begin with
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, name="peers", daemon=True).start()

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    connection = cast(socket.socket, key.fileobj)
                    if connection is self._listener:
                        connection, _ = self._listener.accept()
                        _keep_alive(connection)
                        self._said[connection] = b""
                        selector.register(connection, selectors.EVENT_READ)
                    elif not self._read(connection):
                        selector.unregister(connection)
                        self._closed(connection, self._said.pop(connection))

    def _read(self, connection: socket.socket) -> bool:
        """Reads what a process says; False once its connection is closed."""
        piece = _receive(connection)
        self._said[connection] += piece
        return bool(piece)

    def _closed(self, connection: socket.socket, said: bytes) -> None:
        connection.close()
        start = len(self.token) + INDEX_DIGITS
        index = said[len(self.token) : start]
        if said.startswith(self.token.encode()) and index.isdigit() and said[start:] != END:
            self._lost(int(index))

    def end(self) -> None:
        """Tells all others that process 0 ends as it should."""
        for connection in list(self._said):
            _send(connection, END)


class Client:
    """Connects to the server of process 0 and calls `lost` with 0 if the connection closes without a word.

    Raises: OSError if there is no connection.
    """

    def __init__(self, host: str, port: int, token: str, process: int, lost: Lost):
        self._lost = lost
        self._connection = socket.create_connection((host, port), timeout=CONNECT_S)
        self._connection.settimeout(None)
        _keep_alive(self._connection)
        self._connection.sendall(f"{token}{process:0{INDEX_DIGITS}}".encode())
        self._thread = threading.Thread(target=self._follow, name="peers", daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        if _receive(self._connection) != END:
            self._lost(0)

    def end(self) -> None:
        """Tells process 0 that this process ends as it should."""
        _send(self._connection, END)


def _receive(connection: socket.socket) -> bytes:
    """Returns what came; nothing if the connection is closed or broken."""
    try:
        return connection.recv(1024)
    except OSError:
        return b""


def _send(connection: socket.socket, message: bytes) -> None:
    with contextlib.suppress(OSError):  # the other end may be gone
        connection.sendall(message)


def _keep_alive(connection: socket.socket) -> None:
    """Has the kernel ask every few seconds whether the other machine is there."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in {"TCP_KEEPIDLE": GONE_S // 3, "TCP_KEEPINTVL": GONE_S // 6, "TCP_KEEPCNT": 4}.items():
        if hasattr(socket, name):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
