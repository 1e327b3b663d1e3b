"""Running a server: its home folder, owner token, HTTP listener and dispatcher, and an orderly end of them all.

`serve` is behind `rewardsmith serve`, `dispatch` behind `rewardsmith dispatcher`. Both block until SIGINT or SIGTERM.
Jobs outlive a server that is killed; one that is asked to stop lets them save their state and takes them with it.
"""

from __future__ import annotations

import fcntl
import ipaddress
import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from rewardsmith.errors import ConfigError, Conflict
from rewardsmith.home import ServerConfig
from rewardsmith.jobs.dispatcher import Dispatcher
from rewardsmith.jobs.local import Launcher, LocalLauncher
from rewardsmith.server.app import create_app
from rewardsmith.store import Store

log = logging.getLogger("rewardsmith.server")

# Requests in flight get this long; streams end by themselves well before.
SHUTDOWN_SECONDS = 3


def serve(
    config: ServerConfig, *, dispatcher: bool = True, allow_remote: bool = False, launcher: Launcher | None = None
) -> None:
    """Serve until a signal. Port 0 takes a free one; jobs are processes of this machine unless `launcher` is given.

    Raises ConfigError or Conflict when it cannot start.
    """
    _refuse_remote(config.host, allow_remote)
    _log_to_stderr()
    with (
        _stop_on_signal() as stop,
        _home(config.home),
        _only_one(config.home, "server"),
        _only_one(config.home, "dispatcher") if dispatcher else nullcontext(),
        _listener(config) as listener,
        _store(config) as store,
    ):
        config = replace(config, port=listener.getsockname()[1])
        store.registry.ensure_owner(_owner_token(config.token_file))
        # While no server was there no job could extend its lease.
        store.runs.extend_leases(config.lease_seconds)
        with closing(_Server(create_app(config, store), listener, stop)) as server:
            server.start()
            print(_greeting(config, allow_remote), flush=True)
            if dispatcher:
                # This ends the jobs too. They report while they are being ended, so the listener goes down later.
                _dispatcher(config, store, _url(config), launcher).run(stop)
            else:
                stop.wait()


def dispatch(config: ServerConfig, url: str, *, launcher: Launcher | None = None) -> None:
    """Run only a dispatcher, for a server on `url` that uses the same home. Raises ConfigError or Conflict."""
    _log_to_stderr()
    with (
        _stop_on_signal() as stop,
        _home(config.home),
        _only_one(config.home, "dispatcher"),
        _store(config) as store,
    ):
        print(f"Rewardsmith dispatcher runs jobs of {config.home} for {url}", flush=True)
        _dispatcher(config, store, url, launcher).run(stop)


class _Server(uvicorn.Server):
    """The HTTP side, in a thread of its own. It sets `stop` when it ends, and `close` raises what it died of."""

    def __init__(self, app: FastAPI, listener: socket.socket, stop: threading.Event) -> None:
        self._app = app
        self._listener = listener
        self._stop = stop
        self._ready = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._answer, name="http")
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                log_config=None,
                access_log=False,  # Paths of presigned links are credentials.
                server_header=False,
                timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            )
        )

    def start(self) -> None:
        """Returns when requests are answered, or never will be."""
        self._thread.start()
        self._ready.wait()

    def close(self) -> None:
        self._app.state.closing.set()
        self.should_exit = True
        self._thread.join()
        if self._failure:
            raise self._failure

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready.set()

    def _answer(self) -> None:
        try:
            self.run(sockets=[self._listener])
        except Exception as error:  # It belongs to the thread that waits.
            self._failure = error
        finally:
            self._ready.set()
            self._stop.set()


def _dispatcher(config: ServerConfig, store: Store, url: str, launcher: Launcher | None) -> Dispatcher:
    return Dispatcher(
        store,
        launcher or LocalLauncher(config.home),
        url,
        lease_seconds=config.lease_seconds,
        max_attempts=config.max_attempts,
    )


def _log_to_stderr() -> None:
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("rewardsmith").setLevel(logging.INFO)


@contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    stop = threading.Event()

    def ask_to_stop(number: int, frame: object) -> None:
        stop.set()

    before = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _home(home: Path) -> Iterator[None]:
    """The folder with database, artifacts, logs and token, closed to other users of this machine."""
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        home.chmod(0o700)
    except OSError as error:
        raise ConfigError(
            f"the home folder {home} cannot be used: {error.strerror}. Set REWARDSMITH_HOME to another"
        ) from None
    yield


@contextmanager
def _only_one(home: Path, role: str) -> Iterator[None]:
    """At most one server and one dispatcher for a home: two would each take the other's jobs for lost."""
    with (home / f"{role}.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise Conflict(
                f"another Rewardsmith {role} (process {file.read().strip()}) uses {home}. Stop it first, or set "
                "REWARDSMITH_HOME to another folder"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextmanager
def _listener(config: ServerConfig) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((config.host, config.port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {config.host}:{config.port}: {error.strerror}. Choose another port with --port"
            ) from None
        yield listener


@contextmanager
def _store(config: ServerConfig) -> Iterator[Store]:
    store = Store(
        config.database_url,
        config.artifacts_url,
        max_dataset_bytes=config.max_dataset_bytes,
        key_file=config.key_file,
    )
    with closing(store):
        yield store


def _owner_token(file: Path) -> str:
    """The token in `file`, made at the first start. The stock SDK complains unless it begins with `pb_`."""
    try:
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as new:
            new.write(f"pb_{secrets.token_urlsafe(32)}\n")
    except FileExistsError:
        if file.stat().st_mode & 0o077:
            log.warning("other users could read %s; it is closed now. Delete it to get a new token", file)
            file.chmod(0o600)
    token = file.read_text().strip()
    if not token:
        raise ConfigError(f"{file} is empty; delete it to get a new owner token")
    return token


def _refuse_remote(host: str, allowed: bool) -> None:
    if not allowed and not _is_loopback(host):
        raise ConfigError(
            f"{host} can be reached from other machines, and a token is all it takes to run code here. Stay on "
            "127.0.0.1, or say that you mean it with --allow-remote"
        )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _url(config: ServerConfig) -> str:
    """The server as processes of this machine reach it."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{config.port}"


def _greeting(config: ServerConfig, allow_remote: bool) -> str:
    lines = [
        f"Rewardsmith {version('rewardsmith')} is ready on {_url(config)}",
        f"  home   {config.home}",
        f"  token  {config.token_file} (the SDK and the command line find it by themselves)",
    ]
    if allow_remote and not _is_loopback(config.host):
        lines.append(
            f"  WARNING: listening on {config.host}, open to other machines and not encrypted. Whoever has the token "
            "can run code here; put a proxy with TLS in front"
        )
    return "\n".join([*lines, "Stop it with Ctrl-C."])
