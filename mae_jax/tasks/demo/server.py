"""The page's server: one file, small JSON endpoints, and nothing for anyone but a browser on this machine.

Other pages in that browser are kept out: a request must name this host (DNS rebinding), and come from this page.
"""

import errno
import inspect
import json
import re
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mae_jax.runtime.errors import UserError, complain, first_line
from mae_jax.tasks.demo.viewer import Viewer

PAGE = Path(__file__).parent / "page.html"
MAX_UPLOAD = 64 * 2**20  # bytes
MAX_QUESTION = 2**20  # bytes of JSON
POLL_SECONDS = 0.1  # between looks for the end
OWN_HOST = re.compile(r"(localhost|127\.0\.0\.1)(:\d{1,5})?")  # any port: a tunnel may have another one
HEADERS = {
    # The page's own script and style, its pictures as data, its questions to this server; nothing else, from nowhere.
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Refused(Exception):
    """A request that is not answered, with its HTTP status."""

    def __init__(self, status: HTTPStatus, text: str):
        super().__init__(text)
        self.status = status


class Server(ThreadingHTTPServer):
    """Serves a viewer's page at `address`, which only this machine reaches. UserError if the port cannot be had."""

    daemon_threads = True  # an open connection does not keep the program alive

    def __init__(self, viewer: Viewer, port: int):
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            why = f"demo.port={port} cannot be used ({error.strerror})"
            raise UserError(f"{why}; give another one, or 0 for any that is free") from error
        self.viewer = viewer

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def start(self) -> None:
        threading.Thread(target=self.serve_forever, args=(POLL_SECONDS,), daemon=True).start()

    def stop(self) -> None:
        """Ends the serving, after the answer that is being computed."""
        self.shutdown()
        self.viewer.wait()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away while it is answered is no error."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds of silence, after which a connection is closed
    server: Server

    def do_GET(self) -> None:
        if self.path == "/":
            self._answer(lambda: PAGE.read_bytes(), "text/html; charset=utf-8")
        elif self.path == "/api/about":
            self._answer(lambda: self.server.viewer.about() | {"max_upload": MAX_UPLOAD})
        else:
            self._answer(self._not_found)

    def do_POST(self) -> None:
        viewer = self.server.viewer
        questions = {"open": viewer.open, "reconstruct": viewer.reconstruct, "attention": viewer.attention}
        name = self.path.removeprefix("/api/")
        if self.path == "/api/upload":
            self._answer(lambda: viewer.upload(self._body(MAX_UPLOAD)))
        elif name in questions and self.path == f"/api/{name}":
            self._answer(lambda: self._ask(questions[name]))
        else:
            self._answer(self._not_found)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Requests are not logged."""

    def _answer(self, make: Callable[[], Any], kind: str = "application/json") -> None:
        status = HTTPStatus.OK
        try:
            self._check_origin()
            content = make()
        except Refused as error:
            status, content = error.status, {"error": str(error)}
        except UserError as error:
            status, content = HTTPStatus.BAD_REQUEST, {"error": str(error)}
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:  # the page tells it, and goes on
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            content = {"error": f"{type(error).__name__}: {first_line(error)}"}
            complain(f"{self.path}: {content['error']}")
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind if status == HTTPStatus.OK else "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        if status != HTTPStatus.OK:  # its body may not have been read, and must not be taken for the next request
            self.close_connection = True
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def _check_origin(self) -> None:
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if not OWN_HOST.fullmatch(host):
            raise Refused(HTTPStatus.FORBIDDEN, "this server answers to localhost and 127.0.0.1 only")
        if origin is not None and origin != f"http://{host}":
            raise Refused(HTTPStatus.FORBIDDEN, "this server answers to its own page only")

    def _ask(self, question: Callable[..., dict]) -> dict:
        """A question's answer; its arguments are the body's members."""
        names = inspect.signature(question).parameters
        try:
            arguments = json.loads(self._body(MAX_QUESTION))
        except (ValueError, RecursionError) as error:
            raise Refused(HTTPStatus.BAD_REQUEST, f"the body is no JSON: {first_line(error)}") from error
        if not isinstance(arguments, dict) or arguments.keys() != names.keys():
            raise Refused(HTTPStatus.BAD_REQUEST, f"the body must be a JSON object of {' and '.join(names)}")
        return question(**arguments)

    def _body(self, limit: int) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"\d{1,18}", length):
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "the request does not say its length")
        if int(length) > limit:
            much = f"{int(length) / 2**20:.1f} MiB are too much: at most {limit // 2**20} MiB are taken"
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, much)
        return self.rfile.read(int(length))

    def _not_found(self) -> Any:
        raise Refused(HTTPStatus.NOT_FOUND, f"there is no {self.path}")
