"""The page's server: what it answers, and to whom."""

import http.client
import json
import re
from contextlib import contextmanager

import pytest

from mae_jax.runtime.errors import UserError
from mae_jax.tasks.demo.server import MAX_UPLOAD, PAGE, Server


class Answers:
    """A viewer that tells what it was asked."""

    def about(self):
        return {"name": "runs/digits"}

    def open(self, picture):
        if picture == 7:
            raise UserError("7.png cannot be read:\nit is empty")
        if picture == 8:
            raise KeyError("a fault of the program")
        return {"picture": picture}

    def upload(self, data):
        return {"bytes": len(data)}

    def reconstruct(self, picture, hidden):
        return {"hidden": hidden}

    def attention(self, picture, patch):
        return {"patch": patch}

    def wait(self):
        pass


@contextmanager
def connection():
    server = Server(Answers(), 0)
    server.start()
    client = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    try:
        yield client, server
    finally:
        client.close()
        server.stop()


def ask(client, path, body=None, **headers):
    """(status, answer) of a request: bytes or an object as its body."""
    body = body if body is None or isinstance(body, bytes) else json.dumps(body)
    client.request("GET" if body is None else "POST", path, body, headers)
    response = client.getresponse()
    return response.status, json.loads(response.read())


def test_the_page_is_one_file_that_names_no_other_host_and_may_load_nothing_from_one():
    with connection() as (client, server):
        client.request("GET", "/")
        response = client.getresponse()
        text, policy = response.read().decode(), response.getheader("Content-Security-Policy")
    assert response.status == 200 and text == PAGE.read_text()
    assert not re.search(r"//[\w-]+\.|@import|<link[^>]+http|src=[\"']?\w", text)
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "http" not in policy
    assert server.server_address[0] == "127.0.0.1"


def test_questions_are_answered_in_json_on_one_connection():
    with connection() as (client, _):
        assert ask(client, "/api/about") == (200, {"name": "runs/digits", "max_upload": MAX_UPLOAD})
        assert ask(client, "/api/open", {"picture": 3}) == (200, {"picture": 3})
        assert ask(client, "/api/upload", b"12345") == (200, {"bytes": 5})
        assert ask(client, "/api/reconstruct", {"picture": "a", "hidden": [1]}) == (200, {"hidden": [1]})
        assert ask(client, "/api/attention", {"patch": None, "picture": "a"}) == (200, {"patch": None})


@pytest.mark.parametrize("path, body", [("/", None), ("/api/about", None), ("/api/open", {"picture": 3})])
def test_names_of_other_hosts_are_refused_so_that_no_page_reaches_the_server_by_rebinding_a_name(path, body):
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "10.0.0.1", ""):
        with connection() as (client, _):
            status, answer = ask(client, path, body, Host=host)
            assert status == 403 and "localhost" in answer["error"]


def test_a_tunnel_may_have_another_port_but_other_pages_are_refused():
    with connection() as (client, _):
        assert ask(client, "/api/about", Host="localhost:9000", Origin="http://localhost:9000")[0] == 200
    for origin in ("http://evil.example", "http://localhost:9001", "https://localhost:9000", "null"):
        with connection() as (client, _):
            assert ask(client, "/api/open", {"picture": 3}, Host="localhost:9000", Origin=origin)[0] == 403


def test_a_mistake_is_one_line_and_a_fault_of_the_program_too_and_the_server_goes_on(capsys):
    with connection() as (client, _):
        status, answer = ask(client, "/api/open", {"picture": 7})
        assert status == 400 and answer == {"error": "7.png cannot be read:\\nit is empty"}
        status, answer = ask(client, "/api/open", {"picture": 8})
        assert status == 500 and answer == {"error": "KeyError: 'a fault of the program'"}
        assert ask(client, "/api/open", {"picture": 9}) == (200, {"picture": 9})
    assert capsys.readouterr().err == "/api/open: KeyError: 'a fault of the program'\n"


@pytest.mark.parametrize(
    "path, body, status, text",
    [
        ("/other", None, 404, "there is no /other"),
        ("/api/wait", {}, 404, "there is no /api/wait"),
        ("/api/open", b"{", 400, "no JSON"),
        ("/api/open", b"[" * 100_000, 400, "no JSON"),
        ("/api/open", [3], 400, "object of picture"),
        ("/api/open", {"picture": 3, "more": 4}, 400, "object of picture"),
        ("/api/reconstruct", {"picture": 3}, 400, "object of picture and hidden"),
    ],
)
def test_a_wrong_request_is_told_in_one_line(path, body, status, text):
    with connection() as (client, _):
        found, answer = ask(client, path, body)
        assert found == status and text in answer["error"] and "\n" not in answer["error"]


@pytest.mark.parametrize("length, status", [(str(MAX_UPLOAD + 1), 413), ("9" * 30, 411), ("-1", 411), (None, 411)])
def test_an_upload_that_is_too_large_or_of_unknown_length_is_refused_before_it_is_read(length, status):
    with connection() as (client, _):
        client.putrequest("POST", "/api/upload")
        if length:
            client.putheader("Content-Length", length)
        client.endheaders()
        assert client.getresponse().status == status


def test_a_port_that_is_taken_is_a_mistake_of_the_user():
    with connection() as (_, server), pytest.raises(UserError, match=f"demo.port={server.server_port} cannot be used"):
        Server(Answers(), server.server_port)
