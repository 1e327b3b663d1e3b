"""`rs.secrets` against the real server."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from server.running import Running, running

from rewardsmith import ConfigError, GRPOConfig, RequestError, Rewardsmith


def score(prompt, completion, example):
    return 1.0


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("api") / "home") as server:
        server.prepare()
        yield server


@pytest.fixture
def rs(api: Running) -> Rewardsmith:
    return Rewardsmith(api.http.headers["Authorization"].split()[1], api.url, quiet=True)


def test_a_secret_is_kept_until_it_is_deleted(rs: Rewardsmith):
    assert rs.secrets.create("judge", "value") is None
    assert rs.secrets.get("judge") == "value"
    assert rs.secrets.update("judge", "other") is None
    assert rs.secrets.get("judge") == "other"
    assert [secret.key for secret in rs.secrets.list()] == ["judge"]
    assert rs.secrets.delete("judge") is None
    with pytest.raises(RequestError, match="'judge'"):
        rs.secrets.get("judge")


@pytest.mark.parametrize(("key", "value"), [(5, "text"), ("", "text"), ("key", 5), ("key", None), ("key", "")])
def test_keys_and_values_are_texts(rs: Rewardsmith, key: object, value: object):
    with pytest.raises(ValueError) as refusal:
        rs.secrets.create(key, value)  # type: ignore[arg-type]
    assert isinstance(refusal.value, ConfigError) and "text" in str(refusal.value)


def test_a_job_by_name_of_the_secret(rs: Rewardsmith, tmp_path: Path):
    rs.secrets.create("JUDGE_API_KEY", "sk-1")
    config = GRPOConfig(base_model="countdown-tiny", reward_fns=[score], sampling_params={"max_tokens": 8})
    config.secrets = ["JUDGE_API_KEY"]  # type: ignore[assignment]
    job = rs.finetuning.jobs.create(config=config, dataset="rows", repo="sums")
    assert job.params.secrets == {"JUDGE_API_KEY": "secret:JUDGE_API_KEY"}
    with pytest.raises(RequestError, match=job.uuid):
        rs.secrets.delete("JUDGE_API_KEY")
    rs.finetuning.jobs.cancel(job)


def test_a_config_does_not_show_its_secrets():
    config = GRPOConfig(secrets={"KEY": "value-of-it", "TRIES": 3})
    assert config.secrets == {"KEY": "value-of-it", "TRIES": "3"}
    assert "value-of-it" not in repr(config) and "value-of-it" not in str(config)
    with pytest.raises(ConfigError) as refusal:
        GRPOConfig(secrets={"NOT A NAME": "value-of-it"})
    assert "value-of-it" not in str(refusal.value) and "NOT A NAME" in str(refusal.value)
