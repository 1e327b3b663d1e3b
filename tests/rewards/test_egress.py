"""The proxy, from this side: real listeners, real connections, real refusals. In sandboxes: `test_network`."""

import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rewardsmith import ConfigError, RewardFunctionsRuntimeConfig
from rewardsmith.errors import RewardPoolError
from rewardsmith.rewards import egress
from rewardsmith.rewards.egress import Egress, is_public, refuse_below
from rewardsmith.rewards.sandbox.tiers import Tier


class Service(ThreadingHTTPServer):
    """What functions may be allowed to ask: answers with the path it was asked for and remembers the headers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.seen: list[tuple[str, dict[str, str]]] = []
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"localhost:{self.server_port}"


class Answering(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Service

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers["Content-Length"])))

    def _answer(self, body: bytes) -> None:
        self.server.seen.append((self.path, dict(self.headers)))
        text = self.path.encode() + b" " + body
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def service() -> Iterator[Service]:
    with closing(_Closing(Service())) as held:
        yield held.server


class _Closing:
    def __init__(self, server: Service) -> None:
        self.server = server

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Door:
    """An Egress with one port on this machine, as a sandbox would have it in its own network."""

    def __init__(self, allowed: list[str], private: list[str]) -> None:
        self.egress = Egress(allowed, private)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.egress.attach(self.listener)

    def get(self, url: str, body: bytes | None = None) -> str:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({"http": self.url, "https": self.url}))
        with opener.open(url, body, timeout=10) as answer:
            return answer.read().decode()

    def say(self, head: str) -> bytes:
        """The first answer to bytes of any kind."""
        with socket.create_connection(("127.0.0.1", int(self.url.rpartition(":")[2])), timeout=10) as connection:
            connection.sendall(head.encode())
            return connection.recv(65536)

    def close(self) -> None:
        self.egress.close()
        self.listener.close()


def door(allowed: list[str], private: list[str] | None = None) -> Any:
    return closing(Door(allowed, allowed if private is None else private))


def test_an_endpoint_that_is_named_is_reached(service: Service):
    with door([service.endpoint]) as out:
        assert out.get(f"http://{service.endpoint}/a/path?q=1", b"body") == "/a/path?q=1 body"
        assert out.get(f"http://{service.endpoint}") == "/ "
        path, headers = service.seen[0]
        assert (path, headers["Connection"], headers["Host"]) == ("/a/path?q=1", "close", service.endpoint)
        traffic = out.egress.traffic[service.endpoint]
    assert traffic.connections == 2 and traffic.sent > 100 and traffic.received > 100
    assert not out.egress.refusals


def test_a_tunnel_carries_bytes_both_ways_until_the_end(service: Service):
    with door([service.endpoint]) as out, socket.create_connection(("127.0.0.1", int(out.url.rpartition(":")[2]))) as c:
        c.settimeout(10)
        c.sendall(f"CONNECT {service.endpoint} HTTP/1.1\r\nHost: {service.endpoint}\r\n\r\n".encode())
        assert c.recv(65536) == b"HTTP/1.1 200 Connection established\r\n\r\n"
        c.sendall(b"GET /through HTTP/1.0\r\n\r\n")
        c.shutdown(socket.SHUT_WR)
        said = b"".join(iter(lambda: c.recv(65536), b""))
        assert said.startswith(b"HTTP/1.1 200") and said.endswith(b"/through ")


@pytest.mark.parametrize(
    "target", ["another.example:443", "localhost:1", "LOCALHOST:2", "127.0.0.1:{port}", "[::1]:{port}"]
)
def test_what_is_not_named_is_refused_and_said_once(service: Service, target: str):
    target = target.format(port=service.server_port)
    with door([service.endpoint]) as out:
        for _ in range(2):
            assert out.say(f"CONNECT {target} HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 403 Forbidden")
        with pytest.raises(urllib.error.HTTPError, match="403"):
            out.get(f"http://{target}/")
        assert len(out.egress.refusals) == 1 and f"asked for {target.lower()}, " in out.egress.refusals[0]
        assert out.egress.traffic == {} and service.seen == []


def test_a_name_of_this_machine_is_refused_even_when_it_was_asked_for(service: Service):
    with door([service.endpoint], private=[]) as out:
        answer = out.say(f"CONNECT {service.endpoint} HTTP/1.1\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 403") and b"127.0.0.1" in answer
        assert f"--private-endpoint {service.endpoint}" in out.egress.refusals[0]
        assert service.seen == []


def test_metadata_services_are_refused_by_address_and_by_strange_spelling():
    endpoints = ["169.254.169.254:80", "0x7f000001:80", "2130706433:80", "[::ffff:169.254.169.254]:80", "0.0.0.0:80"]
    with door(endpoints, private=[]) as out:
        for endpoint in endpoints:
            answer = out.say(f"CONNECT {endpoint} HTTP/1.1\r\n\r\n")
            assert answer.startswith((b"HTTP/1.1 403", b"HTTP/1.1 502")), (endpoint, answer)
        assert out.egress.traffic == {}


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
        *("100.64.0.1", "100.100.100.200", "192.0.0.192", "168.63.129.16", "224.0.0.1", "255.255.255.255", "240.0.0.1"),
        *("::1", "::", "fe80::1", "fe80::1%eth0", "fd00:ec2::254", "ff02::1", "2001:db8::1"),
        *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:10.0.0.1", "::127.0.0.1"),
        *("2002:7f00:1::", "2002:a9fe:a9fe::1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1"),
        *("192.0.2.1", "198.18.0.1", "198.51.100.9", "203.0.113.9", "3fff::1", "4000::1", "fec0::1"),
        "2001:0:4136:e378:8000:63bf:80ff:fffe",  # Teredo around 127.0.0.1
    ],
)
def test_addresses_that_are_not_public(address: str):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["93.184.216.34", "1.1.1.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"]
)
def test_addresses_that_are_public(address: str):
    assert is_public(address)


@pytest.mark.parametrize(
    "head",
    [
        "GET /relative HTTP/1.1\r\n\r\n",
        "GET ftp://host/ HTTP/1.1\r\n\r\n",
        "CONNECT host HTTP/1.1\r\n\r\n",
        "CONNECT host:99999 HTTP/1.1\r\n\r\n",
        "CONNECT :443 HTTP/1.1\r\n\r\n",
        "CONNECT host:443\r\n\r\n",
        "GET http://user@host/ HTTP/1.1\r\n\r\n",
        "nonsense\r\n\r\n",
        "CONNECT h\xf6st:443 HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_no_request_to_a_proxy_is_answered_and_forgotten(head: str):
    with door(["host:443"]) as out:
        assert out.say(head).startswith((b"HTTP/1.1 400", b"HTTP/1.1 403"))


def test_a_host_that_does_not_answer_is_said_to_be_away():
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
    with door([f"localhost:{port}", "no-such-name.invalid:443"]) as out:
        answers = [
            out.say(f"CONNECT {host} HTTP/1.1\r\n\r\n") for host in (f"localhost:{port}", "no-such-name.invalid:443")
        ]
    assert all(answer.startswith(b"HTTP/1.1 502") for answer in answers)


def test_a_head_without_end_is_cut_off():
    with door([]) as out, socket.create_connection(("127.0.0.1", int(out.url.rpartition(":")[2]))) as connection:
        connection.settimeout(10)
        with pytest.raises(OSError):
            for _ in range(100):
                connection.sendall(b"x" * 65536)
            if connection.recv(1) == b"":
                raise OSError


def test_a_port_is_closed_with_its_sandbox_and_the_others_stay(service: Service):
    with door([service.endpoint]) as out:
        other = socket.create_server(("127.0.0.1", 0))
        address = other.getsockname()
        out.egress.attach(other)
        out.egress.detach(other)
        with pytest.raises(ConnectionError):
            socket.create_connection(address, timeout=5)
        assert out.get(f"http://{service.endpoint}/still") == "/still "
    with pytest.raises(ConnectionError):
        socket.create_connection(("127.0.0.1", int(out.url.rpartition(":")[2])), timeout=5)


def test_closing_ends_connections_that_are_open(service: Service):
    with door([service.endpoint]) as out:
        tunnel = socket.create_connection(("127.0.0.1", int(out.url.rpartition(":")[2])), timeout=10)
        tunnel.sendall(f"CONNECT {service.endpoint} HTTP/1.1\r\n\r\n".encode())
        assert tunnel.recv(65536)
    with closing(tunnel), suppress(ConnectionResetError):
        assert tunnel.recv(1) == b""
    out.egress.close()


@pytest.mark.parametrize("tier", [Tier.S0, Tier.S1w, Tier.S1])
def test_without_a_network_of_its_own_a_sandbox_gets_none(tier: Tier):
    with pytest.raises(RewardPoolError, match=f"tier S2 or better.*this machine has {tier}"):
        refuse_below(tier)
    refuse_below(Tier.S2)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("api.example.com:443", "api.example.com:443"),
        (" API.Example.com.:443 ", "api.example.com:443"),
        ("10.0.0.1:08000", "10.0.0.1:8000"),
        ("[0:0::1]:80", "[::1]:80"),
    ],
)
def test_endpoints_have_one_form(given: str, kept: str):
    assert RewardFunctionsRuntimeConfig(network=[given, given]).network == [kept]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("https://api.example.com", "is a URL"),
        ("*.example.com:443", "wildcard"),
        ("api.example.com", "has no port"),
        ("api.example.com:0", "has no port"),
        ("api.example.com:99999", "has no port"),
        (":443", "has no port"),
        ("::1:443", "no name of a host"),
        ("[::g]:443", "no IPv6 address"),
        ("bücher.example:443", "in ASCII"),
        ("a b:443", "no name of a host"),
        ("user@host:443", "no name of a host"),
    ],
)
def test_what_is_no_endpoint_is_refused(given: str, says: str):
    with pytest.raises(ConfigError, match=says):
        RewardFunctionsRuntimeConfig(network=[given])


def test_the_variables_name_the_port_in_the_sandbox():
    assert {url for url in egress.PROXY_VARIABLES.values()} == {f"http://127.0.0.1:{egress.PORT}"}
