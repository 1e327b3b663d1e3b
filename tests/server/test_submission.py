"""What makes a job: checked configs, defaults, inheritance, reward functions that load."""

import base64
import json
from typing import Any

import pytest
from server.running import LENGTH, Running, encoded, job_request

from rewardsmith.config import GRPOConfig


def rewards(**functions: str) -> dict[str, Any]:
    return {"functions": {name: {"encodedFn": source} for name, source in functions.items()}}


def refused(api: Running, request: dict[str, Any], status: int = 400) -> str:
    before = len(api.jobs())
    answer = api.submit(request)
    assert answer.status_code == status, answer.text
    assert len(api.jobs()) == before
    return answer.json()["error"]


def test_a_job_has_the_stock_shape_and_its_whole_config(api: Running):
    request = job_request() | {"description": "first", "continueFromVersion": None, "computeSpec": None}
    job = api.submit(request).json()
    assert (job["baseModel"], job["datasetName"], job["targetRepoName"]) == ("countdown-tiny", "rows", "sums")
    assert (job["status"], job["description"], job["accelerator"]["id"]) == ("queued", "first", "cpu")
    assert isinstance(job["targetVersionTag"], int) and job["uuid"]
    assert job["params"]["learning_rate"] == 1e-5
    assert job["params"]["sampling_params"]["max_tokens"] == 32
    assert GRPOConfig(**job["params"]).reward_fns["length"].source == LENGTH


def test_a_run_without_a_length_has_the_documented_one(api: Running):
    assert api.submit(job_request(train_steps=None)).json()["params"]["train_steps"] == 1000
    assert api.submit(job_request(train_steps=None, epochs=2)).json()["params"]["train_steps"] is None


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"base_model": None}, "base_model is not set"),
        ({"base_model": "qwen2-5-7b-instrct"}, "did you mean 'qwen2-5-7b-instruct'"),
        ({"base_model": "nul\0byte"}, "base_model"),
        ({"task": "sft"}, "task"),
        ({"train_stesp": 3}, "did you mean 'train_steps'"),
        ({"learning_rate": -1}, "learning_rate"),
        ({"effective_batch_size": 20}, "multiple of num_generations"),
        ({"sampling_params": {"max_tokens": 4096}}, "max_tokens=4096 leaves no room for a prompt"),
        ({"sampling_params": {"max_tokens": 1024}}, "max_tokens=1024 leaves no room for a prompt"),
        ({"train_steps": 10**30}, "train_steps"),
        ({"secrets": {"NO NAME": "v"}}, "secrets"),
        ({"rewardFns": None}, "reward_fns has no functions"),
        ({"rewardFns": {"functions": {}}}, "reward_fns has no functions"),
        ({"rewardFns": {"functions": {"a": {"encodedFn": "%%%"}}}}, "base64"),
        ({"rewardFns": {"functions": {"total_reward": {"encodedFn": encoded(LENGTH)}}}}, "total_reward"),
    ],
)
def test_a_wrong_config_is_refused_by_name(api: Running, params: dict[str, Any], says: str):
    assert says in refused(api, job_request(**params))


def test_numbers_that_json_can_spell_but_not_carry_are_refused(api: Running):
    headers = {"Content-Type": "application/json"}
    for spelling in ("1e999", "NaN", "Infinity"):
        body = json.dumps(job_request(clip_high=0)).replace('"clip_high": 0', f'"clip_high": {spelling}')
        answer = api.http.post("/v2/finetuning/jobs", content=body, headers=headers)
        assert answer.status_code == 400 and "clip_high" in answer.json()["error"]


def test_a_broken_reward_function_is_refused_with_its_line(api: Running):
    source = "def broken(prompt, completion, example):\n    return undefined_name\n"
    text = refused(api, job_request(rewardFns=rewards(bad=base64.b64encode(source.encode()).decode())))
    assert "'bad'" in text and "line 2" in text and "undefined_name" in text


def using(source: str, **runtime: Any) -> dict[str, Any]:
    return job_request(rewardFns=rewards(f=encoded(source)) | {"runtime": runtime})


def test_packages_are_named_and_nothing_else(api: Running):
    for line, says in (
        ("not a requirement", "no requirement line"),
        ("pydantic @ https://example.org/x.whl", "is a URL"),
        ("-r requirements.txt", "an option"),
        ("./pydantic", "is a path"),
    ):
        text = refused(api, using(LENGTH, packages=["numpy", line]))
        assert repr(line) in text and says in text
    assert "a second time" in refused(api, using(LENGTH, packages=["numpy", "NumPy>=1"]))


def test_functions_are_loaded_unless_their_packages_are_still_to_come(api: Running):
    importing = "def f(prompt, completion, example):\n    import {}\n    return 1.0\n"
    assert api.submit(using(importing.format("packaging"), packages=["packaging>=20"])).status_code == 200
    assert "no_such_module" in refused(api, using(importing.format("no_such_module"), packages=["packaging>=20"]))
    assert api.submit(using(importing.format("rs_tiny"), packages=["rs-tiny==1.0"])).status_code == 200
    broken = base64.b64encode(b"def f(prompt, completion, example):\n    return nowhere\n").decode()
    request = job_request(rewardFns=rewards(f=broken) | {"runtime": {"packages": ["rs-tiny==1.0"]}})
    text = refused(api, request)
    assert "'f'" in text and "line 2" in text and "nowhere" in text


def test_endpoints_are_checked(api: Running):
    assert "is a URL" in refused(api, using(LENGTH, network=["https://api.example.com"]))


def test_unknown_dataset_repo_and_field_are_refused(api: Running):
    assert "no-rows" in refused(api, job_request() | {"dataset": "no-rows"}, 404)
    assert "no-repo" in refused(api, job_request() | {"repo": "no-repo"}, 404)
    assert "dataset is not set" in refused(api, job_request() | {"dataset": None})
    assert "repos" in refused(api, job_request() | {"repos": "sums"}, 422)


def finished_version(api: Running) -> int:
    claim, journal = api.claimed_job()
    folder = f"jobs/{claim.uuid}/checkpoints/1"
    api.store.artifacts.put(f"{folder}/adapter_model.safetensors", b"weights")
    assert journal.step(1).status_code == 200
    where = {"checkpoint": 1, "step": 1, "path": folder, "statePath": "", "fingerprint": "f"}
    assert journal.post("checkpoint", **where).status_code == 200
    assert journal.post("finish", status="completed", checkpoint=1).status_code == 200
    return api.store.runs.get(claim.uuid).target_version_tag


def test_a_continued_run_inherits_all_but_what_it_sets(api: Running):
    tag = finished_version(api)
    short = {"params": {"task": "grpo", "epochs": 2}, "repo": "sums", "continueFromVersion": f"sums/{tag}"}
    job = api.submit(short).json()
    assert (job["datasetName"], job["baseModel"]) == ("rows", "countdown-tiny")
    assert (job["params"]["epochs"], job["params"]["train_steps"]) == (2, None)
    assert job["params"]["sampling_params"]["max_tokens"] == 32
    assert list(job["params"]["rewardFns"]["functions"]) == ["length"]
    api.http.post(f"/v2/finetuning/jobs/{job['uuid']}/cancel")

    of_checkpoint = short | {"continueFromVersion": f"sums/{tag}@1"}
    assert api.submit(of_checkpoint).status_code == 200
    assert "rank" in refused(api, short | {"params": {"rank": 8}})
    assert "no version 999" in refused(api, short | {"continueFromVersion": "sums/999"}, 404)
    assert "no checkpoint 7" in refused(api, short | {"continueFromVersion": f"sums/{tag}@7"}, 404)
    assert "adapter id" in refused(api, short | {"continueFromVersion": "sums"})


def test_the_same_request_again_gives_the_same_job(api: Running):
    keyed = api.submit(job_request(seed=1), **{"Idempotency-Key": "k-1"}).json()["uuid"]
    assert api.submit(job_request(seed=1), **{"Idempotency-Key": "k-1"}).json()["uuid"] == keyed
    assert api.submit(job_request(seed=1), **{"Idempotency-Key": "k-2"}).json()["uuid"] != keyed
    assert api.submit(job_request(seed=2), **{"Idempotency-Key": "k-1"}).status_code == 409

    unkeyed = api.submit(job_request(seed=3)).json()["uuid"]
    assert api.submit(job_request(seed=3)).json()["uuid"] == unkeyed
    assert api.submit(job_request(seed=4)).json()["uuid"] != unkeyed


def test_the_stock_sdk_is_spared_the_zeros_it_cannot_read(api: Running):
    uuid = api.queued_job()
    path = f"/v2/finetuning/jobs/{uuid}"
    ours = api.http.get(path).json()["params"]
    stock = api.http.get(path, headers={"User-Agent": "predibase-sdk/2025.10.3 (x)"}).json()["params"]
    assert ours["lora_dropout"] == 0
    assert stock == {name: value for name, value in ours.items() if name != "lora_dropout"}
