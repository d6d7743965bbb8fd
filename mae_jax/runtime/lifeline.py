"""A connection from every process to process 0, through which they meet and learn at once how one of them ended.

They do not meet at JAX's own service, since that ends a run under way when a process of another run connects to it.
Without the connection they would wait in a collective operation for a process that is gone, until JAX's own heartbeats
end them with a dump of C++. The operating system closes the connection of a process that ends in any way; of a host
that is gone, keep-alive probes tell after HOST_GONE_SECONDS.
"""

import contextlib
import errno
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import BinaryIO, NoReturn

from mae_jax.runtime.errors import UserError, complain, reason

HOST_GONE_SECONDS = 20
LEAVE_SECONDS = 5  # that a process which has failed waits for the others to have heard of it
CONNECT_SECONDS = 60
REFUSED_SECONDS = 10  # that a refused process goes on trying: an earlier run may be about to end
RETRY_SECONDS = 0.5
GREETING, LONGEST_ANSWER = "mae_jax", 4096
OTHER_PORT = "choose another port: --coordinator=HOST:PORT, or JAX_COORDINATOR_PORT under Slurm and Open MPI"
LOST = "was lost: it was killed or crashed, or its host has gone"


class Lifeline:
    """One process's end of the connections. A thread watches them and ends the process when another one fails.

    Args:
      count, index: of the processes.
      host, port: where process 0 listens, as the others reach it. Port 0: process 0 takes one that is free.
      timeout: seconds in which it must be there.
      service_port: of process 0: where JAX's own service will listen.

    Attributes:
      port, service_port: those of process 0, in all processes.

    Raises:
      UserError: if process 0 cannot have its port, or the others do not find it there.
    """

    def __init__(self, count: int, index: int, host: str, port: int, timeout: float, service_port: int = 0):
        self._count, self._index = count, index
        self._leaving = threading.Lock()  # held by the one who says why the process ends
        self._gone, self._all_done = threading.Event(), threading.Event()
        self._peers: dict[socket.socket, int | None] = {}  # of process 0: connection -> process
        self._done: set[int] = set()
        self._joined: set[int] = {0}
        if index == 0:
            server = _listen(port)
            self.port, self.service_port = server.getsockname()[1], service_port
            self._gone.set()  # nobody is here yet
            watch = threading.Thread(target=self._serve, args=(server,), daemon=True)
        else:
            self._up, self._lines, self.service_port = _join(host, port, count, index, timeout)
            self.port = port
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

    def _serve(self, server: socket.socket) -> None:
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
                    known = all([self._take(connection, _parse(line)) for line in lines])
                    if not data or not known:
                        selector.unregister(connection)
                        connection.close()
                        self._lost(connection)

    def _take(self, connection: socket.socket, message: dict) -> bool:
        """Acts on a message of another process; returns whether it is one of this run."""
        if isinstance(message.get(GREETING), int):
            self._welcome(connection, message[GREETING], message.get("count"))
        elif connection in self._peers and "done" in message:
            self._note_done(message["done"])
        elif connection in self._peers and "failed" in message:
            self._end_in_thread(message)
        return connection in self._peers

    def _welcome(self, connection: socket.socket, process: int, count: object) -> None:
        if count != self._count:
            _send(connection, {"refused": f"has {self._count} processes, not {count}"})
        elif process in self._joined:  # also one that is gone again
            _send(connection, {"refused": f"has its process {process} already"})
        elif process in range(self._count):
            self._joined.add(process)
            self._peers[connection] = process
            self._gone.clear()
            _send(connection, {"service_port": self.service_port})

    def _lost(self, connection: socket.socket) -> None:
        process = self._peers.pop(connection, None)
        if process is not None and process not in self._done:
            self._end_in_thread({"failed": process, "code": 1, "reason": LOST})
        if process is not None and not self._peers:
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
        with contextlib.suppress(OSError):  # reset, or no answer to the probes
            for message in map(_parse, self._lines):
                if "all_done" in message:
                    return self._all_done.set()
                self._gone.set()  # all have been told, of this process's failure or of an earlier one
                self._end(message)
        if not self._all_done.is_set():
            self._gone.set()
            self._end({"failed": 0, "code": 1, "reason": LOST})


def _listen(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            try:
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
            except OSError as error:
                if error.errno in (errno.EADDRINUSE, errno.EACCES):
                    raise  # else IPv6 is switched off
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        why = os.strerror(error.errno)
        raise UserError(f"process 0 cannot listen on port {port} ({why}): {OTHER_PORT}") from error


def _join(host: str, port: int, count: int, index: int, timeout: float) -> tuple[socket.socket, BinaryIO, int]:
    """A connection to process 0, the lines that come from it, and its `service_port`."""
    begin = time.monotonic()
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
            _keep_alive(connection)
            _send(connection, {GREETING: index, "count": count})
            lines = connection.makefile("rb")
            answer = _parse(lines.readline(LONGEST_ANSWER))
        except OSError as error:  # it is not there yet
            why, patience = f"{reason(error)}; are all processes started, and can all hosts reach that one?", timeout
        else:
            if "service_port" in answer:
                connection.settimeout(None)
                return connection, lines, answer["service_port"]
            connection.close()
            taken = f"another run, which {answer['refused']}," if "refused" in answer else "another program"
            why, patience = f"{taken} listens there; {OTHER_PORT}", min(timeout, REFUSED_SECONDS)
        if time.monotonic() - begin > patience:
            raise UserError(f"process {index} of {count} does not find its process 0 at {host}:{port}: {why}")
        time.sleep(RETRY_SECONDS)


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
