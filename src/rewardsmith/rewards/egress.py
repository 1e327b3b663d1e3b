"""The one way out of a sandbox: an HTTP proxy that opens the endpoints a job has named, and nothing else.

A sandbox has a network of its own with nobody on it. Before it is closed it opens a port there and hands the listening
socket to this process, where the proxy takes connections from it: there is nothing of it inside to attack, and no other
address to reach. The proxy looks names up itself, refuses addresses of this machine, of private networks and of cloud
metadata services, and connects to the very address that it has checked. An administrator may allow single endpoints of
private networks. What is said in a connection is not looked at: whoever may talk to a host may tell it anything.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import socket
import threading
from collections import deque
from collections.abc import Callable, Collection, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rewardsmith.errors import RewardPoolError
from rewardsmith.rewards.sandbox.tiers import Tier

log = logging.getLogger("rewardsmith.egress")

PORT = 3128  # in the sandbox's own network
_URL = f"http://127.0.0.1:{PORT}"
PROXY_VARIABLES = dict.fromkeys(("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"), _URL)

HEAD_BYTES = PIECE_BYTES = 65536
HEAD_SECONDS, CONNECT_SECONDS, IDLE_SECONDS = 10.0, 15.0, 600.0
MOST_CONNECTIONS = 256  # at a time; others wait

# What is not the open internet, written out: what `ipaddress` says of it changes with the version of Python.
_SPECIAL = tuple(
    map(
        ipaddress.ip_network,
        (
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
            *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
            *("203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
            "168.63.129.16/32",  # a cloud's metadata, although the address looks like any other
            *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),  # tunnels and examples
        ),
    )
)
_UNICAST = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_PLAIN = re.compile(rb"http://([^/?#\s@]+)([^\s#]*)")


@dataclass
class Traffic:
    """What went over the connections to one endpoint, in bytes; with TLS as it is on the wire."""

    connections: int = 0
    sent: int = 0
    received: int = 0

    def add_sent(self, size: int) -> None:
        self.sent += size

    def add_received(self, size: int) -> None:
        self.received += size


class _Refused(Exception):
    """`status` as of HTTP; the text goes to the function that asked, and to the log."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def refuse_below(tier: Tier) -> None:
    """Raises RewardPoolError for a tier whose sandboxes have no network of their own."""
    if tier < Tier.S2:
        raise RewardPoolError(
            f"reward_fns.runtime.network needs a sandbox of tier {Tier.S2} or better, where a function has a network "
            f"of its own and this is the only way out of it; this machine has {tier}. `rewardsmith sandbox` says what "
            "is missing"
        )


class Egress:
    """The proxy of one pool, in a thread of its own. `allowed` and `private` are endpoints, `host:port` in lower case.

    `traffic` is by endpoint. `refusals` gets one sentence for each endpoint that is refused; whoever tells the user
    takes it out.
    """

    def __init__(self, allowed: Collection[str], private: Collection[str]) -> None:
        self.traffic: dict[str, Traffic] = {}
        self.refusals: deque[str] = deque(maxlen=100)
        self._allowed, self._private = frozenset(allowed), frozenset(private)
        self._refused: set[str] = set()
        self._servers: dict[socket.socket, asyncio.Server] = {}
        self._open: set[asyncio.Task[None]] = set()
        self._room = asyncio.Semaphore(MOST_CONNECTIONS)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="egress", daemon=True)
        self._thread.start()

    port = PORT

    def attach(self, listener: socket.socket) -> None:
        """Serve the port of a sandbox. The socket is the proxy's from now on, until `detach`."""
        self._do(self._attach(listener))

    def detach(self, listener: socket.socket) -> None:
        """The sandbox has ended: close its port."""
        if not self._loop.is_closed():
            self._do(self._detach(listener))

    def close(self) -> None:
        """End every connection, and log what went out. More than once does no harm."""
        if self._loop.is_closed():
            return
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        for endpoint, traffic in sorted(self.traffic.items()):
            figures = (endpoint, traffic.connections, traffic.sent, traffic.received)
            log.info("%s: %d connections, %d bytes sent, %d received", *figures)

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _attach(self, listener: socket.socket) -> None:
        self._servers[listener] = await asyncio.start_server(self._serve, sock=listener, limit=HEAD_BYTES)

    async def _detach(self, listener: socket.socket) -> None:
        self._servers.pop(listener).close()

    async def _close(self) -> None:
        for server in self._servers.values():
            server.close()
        self._servers.clear()
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)
        await asyncio.sleep(0)  # a turn in which the sockets are really closed

    # ---- one connection ---------------------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            async with self._room:
                await self._forward(reader, writer)
            writer.close()
        except _Refused as refusal:
            writer.write(_answer(refusal.status, str(refusal)))
            writer.close()
        except (OSError, EOFError, asyncio.LimitOverrunError):
            writer.close()  # either end went away, or what came was no request
        except asyncio.CancelledError:  # by `_close`, which waits for this; streams would log it as an error
            writer.transport.abort()
        finally:
            self._open.discard(task)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        endpoint, first = _parsed(await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), HEAD_SECONDS))
        there, back = await self._connect(endpoint)
        traffic = self.traffic.setdefault(endpoint, Traffic())
        traffic.connections += 1
        try:
            if first is None:
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:
                back.write(first)
                traffic.add_sent(len(first))
            async with asyncio.TaskGroup() as both:
                sending = both.create_task(_pump(reader, back, traffic.add_sent))
                await _pump(there, writer, traffic.add_received)
                sending.cancel()  # nobody listens any more
        except* OSError:
            pass  # one end is gone, and so is the connection
        finally:
            back.transport.abort()

    async def _connect(self, endpoint: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Raises _Refused for an endpoint that is not allowed, is not public, or does not answer."""
        host, _, port = endpoint.rpartition(":")
        if endpoint not in self._allowed:
            self._tell(endpoint, f"a reward function asked for {endpoint}, which is not in reward_fns.runtime.network")
            raise _Refused("403 Forbidden", f"{endpoint} is not in reward_fns.runtime.network")
        looking_up = self._loop.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        try:
            found = await asyncio.wait_for(looking_up, CONNECT_SECONDS)
        except (OSError, UnicodeError) as error:
            reason = f"{host} cannot be looked up: {error or 'no answer'}"
            raise _Refused("502 Bad Gateway", reason) from None
        addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
        usable = [address for address in addresses if endpoint in self._private or is_public(address)]
        if not usable:
            reason = f"{endpoint} is {', '.join(addresses)}, an address of this machine or of a private network"
            cure = f"an administrator can allow it: rewardsmith serve --private-endpoint {endpoint}"
            self._tell(endpoint, f"a reward function asked for {reason}; {cure}")
            raise _Refused("403 Forbidden", reason)
        for address in usable:
            with suppress(OSError):
                opening = asyncio.open_connection(address, int(port), limit=PIECE_BYTES)
                return await asyncio.wait_for(opening, CONNECT_SECONDS)
        raise _Refused("502 Bad Gateway", f"{endpoint} does not answer")

    def _tell(self, endpoint: str, text: str) -> None:
        if endpoint not in self._refused and len(self._refused) < 100:
            self._refused.add(endpoint)
            self.refusals.append(text)
            log.warning("%s", text)


def is_public(text: str) -> bool:
    """Whether an address is one of the open internet. One with an IPv4 address inside is as public as that."""
    address: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = ipaddress.IPv4Address(address.packed[-4:]) if address in _NAT64 else address.ipv4_mapped
        if inner is None and address not in _UNICAST:
            return False
        address = inner or address
    return not any(address in network for network in _SPECIAL)


def _parsed(head: bytes) -> tuple[str, bytes | None]:
    """The endpoint that is asked for, and for plain HTTP the request to send on. Raises _Refused."""
    line, _, headers = head.partition(b"\r\n")
    words = line.split(b" ")
    if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
        raise _Refused("400 Bad Request", "this is a proxy for HTTP")
    method, target, version = words
    if method == b"CONNECT":
        return _endpoint(target, None), None
    if not (found := _PLAIN.fullmatch(target)):
        raise _Refused("400 Bad Request", "this is a proxy: ask for http://host/path, or CONNECT host:port")
    # One request for each connection: the next one could be for another host.
    kept = [
        header
        for header in headers.split(b"\r\n")
        if header
        and header.partition(b":")[0].strip().lower() not in (b"connection", b"proxy-connection", b"keep-alive")
    ]
    path = found[2] if found[2].startswith(b"/") else b"/" + found[2]
    first = b"\r\n".join([b"%s %s %s" % (method, path, version), *kept, b"Connection: close", b"", b""])
    return _endpoint(found[1], 80), first


def _endpoint(authority: bytes, default_port: int | None) -> str:
    host, colon, port = authority.decode("ascii", "replace").lower().rpartition(":")
    if not colon or port.endswith("]"):
        host, port = f"{host}{colon}{port}", str(default_port)
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise _Refused("400 Bad Request", "the address to connect to is host:port")
    return f"{host.removesuffix('.')}:{int(port)}"


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, count: Callable[[int], None]) -> None:
    """All that comes, until its end, of which the other side is told. TimeoutError when nothing comes for long."""
    while data := await asyncio.wait_for(source.read(PIECE_BYTES), IDLE_SECONDS):
        count(len(data))
        sink.write(data)
        await sink.drain()
    sink.write_eof()


def _answer(status: str, reason: str) -> bytes:
    body = f"{reason}\n".encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + body
