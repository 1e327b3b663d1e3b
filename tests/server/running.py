"""A server in this process for tests: real uvicorn on a free port, a real home, and calls as the owner."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from processes import wait_until

from rewardsmith.home import ServerConfig
from rewardsmith.reward_config import RewardFunction
from rewardsmith.server.app import create_app
from rewardsmith.store import Claim, Store

TOKEN = "pb_owner-of-the-tests"
LENGTH = "def length(prompt, completion, example):\n    return len(completion) / 10\n"
ROWS = b'{"prompt": "2 + 2 =", "answer": 4}\n{"prompt": "3 + 5 =", "answer": 8}\n'


@dataclass(frozen=True)
class Running:
    """`http` calls as the owner, `anyone` without a token. `store` is the server's own."""

    config: ServerConfig
    store: Store
    http: httpx.Client
    anyone: httpx.Client

    @property
    def url(self) -> str:
        return str(self.http.base_url).rstrip("/")

    def upload(self, name: str, content: bytes = ROWS, file_name: str = "rows.jsonl") -> httpx.Response:
        ticket = self.http.post("/v2/datasets/upload", json={"fileName": file_name}).json()
        self.anyone.put(ticket["presignedUrl"], content=content).raise_for_status()
        return self.http.put("/v2/datasets/upload", json={"name": name, "uploadToken": ticket["uploadToken"]})

    def prepare(self) -> None:
        """The repo `sums` and the dataset `rows`."""
        self.http.post("/v2/repos", json={"name": "sums", "existsOk": True}).raise_for_status()
        self.upload("rows").raise_for_status()

    def submit(self, request: dict[str, Any] | None = None, **headers: str) -> httpx.Response:
        return self.http.post("/v2/finetuning/jobs", json=request or job_request(), headers=headers)

    def queued_job(self) -> str:
        answer = self.submit(**{"Idempotency-Key": f"key-{id(object())}-{threading.get_ident()}-{len(self.jobs())}"})
        assert answer.status_code == 200, answer.text
        return answer.json()["uuid"]

    def jobs(self) -> list[dict[str, Any]]:
        return self.http.get("/v2/finetuning/jobs").json()["data"]["jobs"]

    def claimed_job(self) -> tuple[Claim, "Journal"]:
        """A new job, claimed as a dispatcher would."""
        uuid = self.queued_job()
        while (claim := self.store.runs.claim("test-host", 60)) and claim.uuid != uuid:
            pass
        assert claim
        return claim, Journal(self, claim)


@dataclass(frozen=True)
class Journal:
    """A job process's side of the API."""

    server: Running
    claim: Claim

    def get(self, path: str) -> httpx.Response:
        return self.server.anyone.get(self._url(path), headers=self.headers)

    def post(self, route: str, **body: Any) -> httpx.Response:
        return self.server.anyone.post(self._url(route), json={"fence": self.claim.fence, **body}, headers=self.headers)

    def step(self, step: int, **metrics: float) -> httpx.Response:
        where = {"step": step, "epoch": step / 4, "totalSteps": 3, "stepsPerEpoch": 4, "revision": 1}
        return self.post("report", **where, metrics={"total_reward": step / 10, **metrics}, segments=[])

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.claim.token}"}

    def _url(self, path: str) -> str:
        return f"/v2/journal/{self.claim.uuid}/{path}"


def encoded(source: str) -> str:
    return RewardFunction.from_source(source).encoded_fn


def job_request(**params: Any) -> dict[str, Any]:
    functions = {"length": {"encodedFn": encoded(LENGTH)}}
    defaults = {
        "base_model": "countdown-tiny",
        "train_steps": 3,
        "sampling_params": {"max_tokens": 32},
        "rewardFns": {"functions": functions},
    }
    return {"params": {**defaults, **params}, "dataset": "rows", "repo": "sums"}


@contextmanager
def running(home: Path, **settings: Any) -> Iterator[Running]:
    home.mkdir(parents=True, exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = ServerConfig(home=home, port=listener.getsockname()[1], **settings)
        store = Store(
            config.database_url,
            config.artifacts_url,
            max_dataset_bytes=config.max_dataset_bytes,
            key_file=config.key_file,
        )
        store.registry.ensure_owner(TOKEN)
        app = create_app(config, store)
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None, timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_until(lambda: server.started, "the server starts")
            url = f"http://127.0.0.1:{config.port}"
            with (
                httpx.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=30) as http,
                httpx.Client(base_url=url, timeout=30) as anyone,
            ):
                yield Running(config, store, http, anyone)
        finally:
            app.state.closing.set()
            server.should_exit = True
            thread.join()
            store.close()
