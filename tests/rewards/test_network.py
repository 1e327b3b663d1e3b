"""The network, secrets and packages of reward functions, seen from inside their sandboxes."""

import json
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from reward_pools import named, pool
from test_egress import Service, _Closing
from test_packages import index, silent  # noqa: F401 - a fixture
from wheels import Index

from rewardsmith.errors import RewardPoolError
from rewardsmith.rewards.grants import Grants
from rewardsmith.rewards.outcomes import Score
from rewardsmith.rewards.packages import open_environment
from rewardsmith.rewards.pool import Group
from rewardsmith.rewards.sandbox import probe
from rewardsmith.rewards.sandbox.tiers import Tier

needs_namespaces = pytest.mark.skipif(
    Tier[probe.report().tier] < Tier.S2,
    reason="a network of its own needs namespaces, which this machine lacks",
)
KEY = "sk-7f3a-very-secret"


@pytest.fixture
def service() -> Iterator[Service]:
    with closing(_Closing(Service())) as held:
        yield held.server


def asked(service: Service, function: object, completion: str = "c", **settings: object) -> Score:
    runtime = {"network": [service.endpoint], **settings}
    grants = Grants({"ENDPOINT": service.endpoint, "API_KEY": KEY}, [service.endpoint])
    functions = [named("f", function)]  # type: ignore[arg-type]
    with pool(functions, workers=1, runtime=runtime, grants=grants) as scoring:
        return scoring.score([Group("p", {}, [completion])])[0][0]["f"]


def get(prompt, completion, example):
    import os
    import urllib.request

    request = urllib.request.Request(f"http://{os.environ['ENDPOINT']}/judge")
    request.add_header("Authorization", f"Bearer {os.environ['API_KEY']}")
    with urllib.request.urlopen(request, timeout=5) as answer:
        print(answer.read().decode())
    return 1.0


@needs_namespaces
@pytest.mark.parametrize("mode", ["warm", "call"])
def test_a_named_endpoint_is_reached_with_the_key(service: Service, mode: str) -> None:
    score = asked(service, get, mode=mode)
    assert (score.outcome, score.prints.strip()) == ("ok", "/judge"), score
    assert service.seen[0][1]["Authorization"] == f"Bearer {KEY}"


@needs_namespaces
def test_nothing_else_is_reached(service: Service) -> None:
    def f(prompt, completion, example):
        import http.client
        import socket
        import urllib.error
        import urllib.request

        found = []
        for url in ("http://169.254.169.254/latest/", "http://example.com/", "http://localhost:1/"):
            try:
                urllib.request.urlopen(url, timeout=5)
                found.append("reached")
            except urllib.error.HTTPError as error:
                found.append(error.code)
        tunnel = http.client.HTTPSConnection("127.0.0.1", 3128, timeout=5)
        tunnel.set_tunnel("169.254.169.254", 443)
        for connect in (tunnel.connect, lambda: socket.create_connection(("1.1.1.1", 443), 5)):
            try:
                connect()
                found.append("reached")
            except OSError as error:
                found.append("403" if "403" in str(error) else "unreachable")
        try:
            socket.create_server(("127.0.0.1", 0))
            found.append("bound")
        except OSError:
            found.append("not bound")
        print(found)
        return 1.0

    score = asked(service, f)
    assert score.prints.strip() == "[403, 403, 403, '403', 'unreachable', 'not bound']", score


@needs_namespaces
def test_programs_of_run_python_have_no_network(service: Service) -> None:
    def f(prompt, completion, example):
        from reward_tools import run_python

        print(run_python(completion).out)
        return 1.0

    program = """
import socket
try:
    socket.create_connection(("127.0.0.1", 3128), 5)
    print("reached")
except OSError as error:
    print(type(error).__name__)
"""
    assert asked(service, f, program).prints.strip() == "PermissionError"


@needs_namespaces
def test_an_endpoint_of_this_machine_is_not_for_a_job_to_open(service: Service) -> None:
    def f(prompt, completion, example):
        import urllib.error
        import urllib.request

        try:
            urllib.request.urlopen(f"http://{completion}/", timeout=5)
        except urllib.error.HTTPError as error:
            return error.code
        return 0

    with pool([named("f", f)], workers=1, runtime={"network": [service.endpoint]}) as scoring:
        assert scoring.score([Group("p", {}, [service.endpoint])])[0][0]["f"].value == 403
        notes = scoring.take_notes()
    assert any(f"--private-endpoint {service.endpoint}" in note for note in notes) and service.seen == []


@needs_namespaces
def test_a_sandbox_that_is_started_anew_has_its_door_again(service: Service) -> None:
    def f(prompt, completion, example):
        import os
        import urllib.request

        if completion == "die":
            os.kill(os.getpid(), 9)
        with urllib.request.urlopen(f"http://{os.environ['ENDPOINT']}/", timeout=5):
            return 1.0

    grants = Grants({"ENDPOINT": service.endpoint}, [service.endpoint])
    with pool([named("f", f)], workers=2, runtime={"network": [service.endpoint]}, grants=grants) as scoring:
        scores = scoring.score([Group("p", {}, ["a", "die", "b", "c"])])[0]
        assert [score["f"].outcome for score in scores] == ["ok", "crash", "ok", "ok"]


def test_below_namespaces_network_is_refused_and_not_half_given() -> None:
    settings = {"workers": 1, "runtime": {"network": ["api.example.com:443"]}, "tier": Tier.S1}
    with pytest.raises(RewardPoolError, match="tier S2 or better"), pool([named("f", get)], **settings):
        pass


def test_values_of_secrets_leave_the_pool_in_no_text() -> None:
    def f(prompt, completion, example):
        import os

        key = os.environ["API_KEY"]
        print("using", key, [key])
        os.write(1, b"past the capture: " + key.encode())
        if completion == "raise":
            raise RuntimeError(f"401 for {key}")
        if completion == "die":
            os._exit(3)
        if completion == "hang":
            while True:
                pass
        return key

    secrets = Grants({"API_KEY": KEY})
    with pool([named("f", f)], workers=1, grants=secrets, runtime={"call_seconds": 0.5}) as scoring:
        scores = scoring.score([Group("p", {}, ["", "raise", "die", "hang"])])[0]
    said = "".join(f"{score['f'].prints} {score['f'].error}" for score in scores)
    assert [score["f"].outcome for score in scores] == ["not_a_number", "exception", "crash", "timeout"]
    assert said.count("[secret API_KEY]") >= 4 and "7f3a" not in said
    with (
        pool([named("f", f, on_error="fail")], workers=1, grants=secrets) as scoring,
        pytest.raises(RewardPoolError) as failure,
    ):
        scoring.score([Group("p", {}, ["raise"])])
    assert "[secret API_KEY]" in str(failure.value) and "7f3a" not in str(failure.value)


def test_secrets_are_for_the_functions_alone() -> None:
    def f(prompt, completion, example):
        import os

        return float(os.environ.get("API_KEY") == "sk-7f3a-very-secret")

    with pool([named("f", f)], workers=1, grants=Grants({"API_KEY": KEY})) as scoring:
        assert scoring.score([Group("p", {}, ["c"])])[0][0]["f"].value == 1.0
        assert "API_KEY" not in os.environ
        for process in Path("/proc").glob("[0-9]*"):
            for file in ("cmdline", "environ"):
                try:
                    assert KEY.encode() not in (process / file).read_bytes(), (process.name, file)
                except OSError:
                    continue
    with pool([named("f", f)], workers=1) as scoring:
        assert scoring.score([Group("p", {}, ["c"])])[0][0]["f"].value == 0.0


def test_installed_packages_are_imported_and_cannot_be_changed(index: Index, tmp_path: Path) -> None:  # noqa: F811
    trap = tmp_path / "was run"
    files = {"rs_tiny.py": "version = '1.0'\n", "rs_tiny.pth": f"import os; os.system('touch {trap}')\n"}
    index.add("rs_tiny", "1.0", files=files)

    def f(prompt, completion, example):
        import json
        import os

        import rs_tiny

        found = [rs_tiny.version]
        for path in (rs_tiny.__file__, os.path.dirname(rs_tiny.__file__) + "/new.py"):
            try:
                open(path, "w").close()
                found.append("written")
            except OSError:
                found.append("refused")
        try:
            import pydantic  # noqa: F401

            found.append("the server's own are there")
        except ImportError:
            pass
        print(json.dumps(found))
        return 1.0

    with open_environment(["rs-tiny"], silent) as environment:
        before = {path: path.read_bytes() for path in environment.folders[0].rglob("*.py")}
        with pool([named("f", f)], workers=1, site_dirs=environment.folders) as scoring:
            score = scoring.score([Group("p", {}, ["c"])])[0][0]["f"]
        assert json.loads(score.prints) == ["1.0", "refused", "refused"], score
        assert {path: path.read_bytes() for path in environment.folders[0].rglob("*.py")} == before
    assert not trap.exists(), "a .pth file is run in the sandbox, when that is closed"
