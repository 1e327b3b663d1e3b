"""Secrets over HTTP: the contract's calls, and that no answer of any other address has a value in it."""

from typing import Any

from server.running import LENGTH, Running, encoded, job_request

VALUE = "sk-7f3a-geheim"


def call(api: Running, method: str, **body: str) -> Any:
    return api.http.request(method, "/v2/secrets", json=body)


def test_the_calls_of_the_contract(api: Running):
    assert call(api, "POST", key="judge", value=VALUE).json()["key"] == "judge"
    assert call(api, "GET", key="judge").json() == {"key": "judge", "value": VALUE}
    assert call(api, "PUT", key="judge", value="other").status_code == 200
    assert call(api, "GET", key="judge").json()["value"] == "other"
    listed = api.http.get("/v2/secrets/keys").json()
    assert [secret["key"] for secret in listed] == ["judge"] and "other" not in str(listed)
    assert call(api, "DELETE", key="judge").status_code == 204
    assert call(api, "GET", key="judge").status_code == 404


def test_wrong_calls_are_refused_without_the_value(api: Running):
    assert call(api, "POST", key="twice", value=VALUE).status_code == 200
    answers = [
        call(api, "POST", key="twice", value=VALUE),
        call(api, "PUT", key="none", value=VALUE),
        call(api, "POST", key="", value=VALUE),
        call(api, "POST", key="many", value=VALUE * 10_000),
        call(api, "POST", key="more", value=VALUE, extra=VALUE),
        api.http.request("POST", "/v2/secrets", json={"key": "number", "value": 5}),
        api.http.request("GET", "/v2/secrets"),
        api.http.request("POST", "/v2/secrets", content=b'{"key": "half", "value": "\\ud800"}'),
    ]
    assert [answer.status_code for answer in answers] == [409, 404, 422, 422, 422, 422, 422, 422]
    assert all(VALUE not in answer.text for answer in answers)
    call(api, "DELETE", key="twice")


def test_a_token_is_needed_and_a_job_has_the_wrong_one(api: Running):
    assert api.anyone.request("GET", "/v2/secrets", json={"key": "judge"}).status_code == 401
    _, journal = api.claimed_job()
    assert api.anyone.get("/v2/secrets/keys", headers=journal.headers).status_code == 403


def submitted(api: Running, **secrets: str) -> dict[str, Any]:
    answer = api.submit(job_request(secrets=secrets))
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_only_the_job_sees_the_values(api: Running):
    call(api, "POST", key="judge", value=VALUE)
    job = submitted(api, PLAIN="plain-and-secret", STORED="secret:judge")
    assert job["params"]["secrets"] == {"PLAIN": "[secret PLAIN]", "STORED": "secret:judge"}
    while (claim := api.store.runs.claim("host", 60)) and claim.uuid != job["uuid"]:
        pass
    assert claim
    spec = api.anyone.get(f"/v2/journal/{job['uuid']}/spec", headers={"Authorization": f"Bearer {claim.token}"}).json()
    assert spec["secrets"] == {"PLAIN": "plain-and-secret", "STORED": VALUE}
    here = f"/v2/finetuning/jobs/{job['uuid']}"
    for path in (here, f"{here}/revisions", f"{here}/events", "/v2/finetuning/jobs"):
        shown = api.http.get(path).text
        assert "plain-and-secret" not in shown and VALUE not in shown
    assert call(api, "DELETE", key="judge").status_code == 409
    api.http.post(f"{here}/cancel")


def test_a_config_goes_back_as_it_came_and_as_it_was_sent(api: Running):
    job = submitted(api, KEY="plain-and-secret")
    config = f"/v2/finetuning/jobs/{job['uuid']}/config"
    assert api.http.put(config, json=job["params"]).status_code == 204
    assert api.http.put(config, json=job["params"] | {"secrets": {"KEY": "plain-and-secret"}}).status_code == 204
    changed = job["params"]["rewardFns"] | {"functions": {"size": {"encodedFn": encoded(LENGTH)}}}
    answer = api.http.put(config, json=job["params"] | {"rewardFns": changed})
    assert answer.status_code == 200 and "plain-and-secret" not in answer.text
    assert api.store.secrets.of_job(job["uuid"]) == {"KEY": "plain-and-secret"}
    for secrets in ({"KEY": "another-one"}, {"KEY": "plain-and-secret", "MORE": "another-one"}):
        answer = api.http.put(config, json=job["params"] | {"secrets": secrets})
        assert answer.status_code == 400 and "secrets." in answer.text and "another-one" not in answer.text
    api.http.post(f"/v2/finetuning/jobs/{job['uuid']}/cancel")


def test_secrets_that_cannot_be_variables_are_refused_by_name(api: Running):
    for name in ("WITH SPACE", "1ST", "PATH", "https_proxy", "REWARDSMITH_JOB", "LD_PRELOAD", "PYTHONPATH"):
        answer = api.submit(job_request(secrets={name: VALUE}))
        assert answer.status_code == 400 and name in answer.text and VALUE not in answer.text
    for secrets in ({"KEY": ""}, {"KEY": "a\0b"}, {"KEY": "secret:none"}, {"KEY": "[secret KEY]"}):
        answer = api.submit(job_request(secrets=secrets))
        assert answer.status_code == 400 and "KEY" in answer.text, answer.text
    by_name = api.submit(job_request(secrets=["none"]))
    assert by_name.status_code == 400 and "'none'" in by_name.text
