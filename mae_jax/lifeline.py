"""A connection from every process to process 0, by which all learn at once how one of them ended.

Without it the others would wait in a collective operation for a process that is gone, until JAX's own heartbeats end
them with a dump of C++. The operating system closes the connection of a process that ends in any way; of a host that
is gone, keep-alive probes tell after HOST_GONE_SECONDS.
"""

import json
import os
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from mae_jax.errors import complain

HOST_GONE_SECONDS = 20
LEAVE_SECONDS = 5  # that a process which has failed waits for the others to have heard of it
CONNECT_SECONDS = 60
LOST = "was lost: it was killed or crashed, or its host has gone"


class Lifeline:
    """One process's end of the connections. A thread watches them and ends the process when another one fails.

    Args:
      count, index: of the processes.
      host: where process 0 is, as the others reach it.
      publish, fetch: hand a text from process 0 to all others.

    Raises:
      OSError: if process 0 cannot be reached.
    """

    def __init__(self, count: int, index: int, host: str, publish: Callable[[str], None], fetch: Callable[[], str]):
        self._count, self._index = count, index
        self._leaving = threading.Lock()  # held by the one who says why the process ends
        self._gone, self._all_done = threading.Event(), threading.Event()
        self._peers: dict[socket.socket, int | None] = {}  # of process 0: connection -> process
        self._done: set[int] = set()
        if index == 0:
            token = secrets.token_hex(16)
            server = _listen()
            publish(f"{server.getsockname()[1]} {token}")
            watch = threading.Thread(target=self._serve, args=(server, token), daemon=True)
        else:
            port, token = fetch().split()
            self._up = socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS)
            self._up.settimeout(None)
            _keep_alive(self._up)
            _send(self._up, {"process": index, "token": token})
            watch = threading.Thread(target=self._listen_to_process_0, daemon=True)
        watch.start()

    def leave(self, code: int, reason: str, say: Callable[[], None]) -> NoReturn:
        """Says why this process ends, ends the others for the same reason, and then this one.

        Args:
          code: exit code of all processes.
          reason: what the others print, after this process's number.
          say: prints what this process has to say of it; not called if it is ending because of another one.
        """
        with self._leaving:
            finished = self._all_done.is_set()
            if not finished:
                say()
                self._tell({"failed": self._index, "code": code, "reason": reason})
            if self._index == 0 or not finished:  # the others need the service that runs in process 0
                self._gone.wait(LEAVE_SECONDS)
            _exit(code)

    def finish(self) -> None:
        """Returns when all processes have come to their end; from then on nobody's end is a failure."""
        if self._index == 0:
            self._note_done(0)
        else:
            _send(self._up, {"done": self._index})
        self._all_done.wait()

    def _tell(self, message: dict) -> None:
        for connection in list(self._peers) if self._index == 0 else [self._up]:
            _send(connection, message)

    def _end(self, message: dict) -> None:
        """Ends this process because of another one."""
        if not self._leaving.acquire(blocking=False):
            return
        said = f"process {message['failed']} {message['reason']}"
        complain(said if message["code"] > 128 else f"error: {said}")
        if self._index == 0:
            self._tell(message)
            self._gone.wait(LEAVE_SECONDS)
        _exit(message["code"])

    # Process 0.

    def _serve(self, server: socket.socket, token: str) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(server, selectors.EVENT_READ)
            buffers: dict[socket.socket, bytes] = {}
            while True:
                for key, _ in selector.select():
                    if key.fileobj is server:
                        try:
                            connection, _ = server.accept()
                            _keep_alive(connection)
                        except OSError:  # the caller was gone again
                            continue
                        selector.register(connection, selectors.EVENT_READ)
                        buffers[connection] = b""
                        continue
                    connection = key.fileobj
                    data = _receive(connection)
                    *lines, buffers[connection] = (buffers[connection] + data).split(b"\n")
                    known = all([self._take(connection, _parse(line), token) for line in lines])
                    if not data or not known:
                        selector.unregister(connection)
                        connection.close()
                        self._lost(connection)

    def _take(self, connection: socket.socket, message: dict, token: str) -> bool:
        """Acts on a message of another process; returns whether it is one."""
        if message.get("token") == token:
            self._peers[connection] = message["process"]
        elif connection in self._peers and "done" in message:
            self._note_done(message["done"])
        elif connection in self._peers and "failed" in message:
            self._end_in_thread(message)
        return connection in self._peers

    def _lost(self, connection: socket.socket) -> None:
        process = self._peers.pop(connection, None)
        if process is not None and process not in self._done:
            self._end_in_thread({"failed": process, "code": 1, "reason": LOST})
        if not self._peers:
            self._gone.set()

    def _end_in_thread(self, message: dict) -> None:
        # This thread goes on, to see the others leave.
        threading.Thread(target=self._end, args=(message,), daemon=True).start()

    def _note_done(self, process: int) -> None:
        self._done.add(process)
        if len(self._done) == self._count:
            for connection in list(self._peers):
                _send(connection, {"all_done": True})
            self._all_done.set()

    # The others.

    def _listen_to_process_0(self) -> None:
        lines = b""
        while not self._all_done.is_set():
            data = _receive(self._up)
            *whole, lines = (lines + data).split(b"\n")
            for message in map(_parse, whole):
                if "all_done" in message:
                    self._all_done.set()
                else:
                    self._gone.set()  # all have been told, of this process's failure or of an earlier one
                    self._end(message)
            if not data and not self._all_done.is_set():
                self._gone.set()
                self._end({"failed": 0, "code": 1, "reason": LOST})
                return


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        except OSError:  # IPv6 is switched off
            pass
    return socket.create_server(("", 0), backlog=1024)


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    probes = {"TCP_KEEPIDLE": HOST_GONE_SECONDS // 4, "TCP_KEEPINTVL": HOST_GONE_SECONDS // 4, "TCP_KEEPCNT": 3}
    for name, value in probes.items():
        if hasattr(socket, name):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _send(connection: socket.socket, message: dict) -> None:
    try:
        connection.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        pass  # the one who listened is gone, which the reading side sees


def _parse(line: bytes) -> dict:
    try:
        message = json.loads(line)
    except ValueError:  # a stranger who tries all ports
        return {}
    return message if isinstance(message, dict) else {}


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(65536)
    except OSError:  # reset, or no answer to the probes
        return b""


def _exit(code: int) -> NoReturn:
    """Ends the process whatever its other threads wait for."""

    def flush():
        sys.stdout.flush()
        sys.stderr.flush()

    flushing = threading.Thread(target=flush, daemon=True)  # another thread may hold the file, blocked for good
    flushing.start()
    flushing.join(1)
    os._exit(code)
