"""Users, repos and adapter versions over HTTP, in the shapes of contract 5.1."""

import io
import zipfile

import pytest
from server.running import Running


def test_the_current_user_has_every_key_the_stock_sdk_needs(api: Running):
    user = api.http.get("/users/current").json()
    assert isinstance(user["id"], int) and user["username"] and user["uuid"]
    assert user["tenant"]["shortCode"]
    needed = {"id", "tier", "isTrial", "expiration", "daysRemainingInPlan", "active"}
    assert needed <= set(user["tenant"]["subscription"])


def test_a_repo_is_created_once_found_by_name_and_uuid_and_deleted(api: Running):
    made = api.http.post("/v2/repos", json={"name": "a-repo", "description": "d", "existsOk": False}).json()
    assert made["name"] == "a-repo" and made["description"] == "d" and made["versions"] == []
    again = api.http.post("/v2/repos", json={"name": "a-repo"})
    assert again.status_code == 409
    assert api.http.post("/v2/repos", json={"name": "a-repo", "existsOk": True}).json()["uuid"] == made["uuid"]
    assert api.http.get("/v2/repos/a-repo").json() == api.http.get(f"/v2/repos/{made['uuid']}").json()
    assert "a-repo" in [repo["name"] for repo in api.http.get("/v2/repos?limit=5").json()["data"]["repos"]]
    deleted = api.http.delete("/v2/repos/a-repo")
    assert (deleted.status_code, deleted.content) == (204, b"")
    assert api.http.get("/v2/repos/a-repo").status_code == 404
    assert api.http.delete("/v2/repos/a-repo").status_code == 404


def test_a_limit_out_of_range_is_refused(api: Running):
    assert api.http.get("/v2/repos?limit=0").status_code == 422
    assert api.http.get("/v2/repos?limit=many").status_code == 422


def test_a_version_is_looked_up_archived_downloaded_and_deleted(api: Running):
    claim, journal = api.claimed_job()
    folder = f"jobs/{claim.uuid}/checkpoints/1"
    api.store.artifacts.put(f"{folder}/adapter_config.json", b"{}")
    api.store.artifacts.put(f"{folder}/adapter_model.safetensors", b"weights")
    where = {"checkpoint": 1, "step": 1, "path": folder, "statePath": "", "fingerprint": "f"}
    assert journal.step(1).status_code == 200
    assert journal.post("checkpoint", **where).status_code == 200
    tag = api.store.runs.get(claim.uuid).target_version_tag
    version = f"/v2/repos/sums/version/{tag}"

    running = api.http.get(version).json()
    assert running["status"] == "training" and running["adapterPath"] is None
    refused = api.http.get(f"{version}/download")
    assert refused.status_code == 404 and "training" in refused.json()["error"]["message"]
    assert api.http.get(f"{version}@1").json()["checkpoint"] == 1
    assert api.http.delete(version).status_code == 403

    assert journal.post("finish", status="completed", checkpoint=1).status_code == 200
    done = api.http.get(version).json()
    assert done["finetuningJob"] == {"uuid": claim.uuid, "error": None}
    assert (done["repo"], done["tag"], done["baseModel"]) == ("sums", tag, "countdown-tiny")
    zipped = api.http.get(f"{version}/download")
    assert zipped.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(zipped.content)) as archive:
        assert sorted(archive.namelist()) == ["adapter_config.json", "adapter_model.safetensors"]
        assert archive.read("adapter_model.safetensors") == b"weights"

    assert api.http.put(version, json={"archived": True}).json()["archived"] is True
    assert api.http.put(f"{version}@1", json={"archived": True}).status_code == 400
    listed = api.http.get("/v2/adapters?repo=sums").json()["data"]["adapters"]
    assert tag in [adapter["tag"] for adapter in listed if adapter["archived"]]
    assert api.http.delete(version).status_code == 204
    assert api.http.get(version).status_code == 404


@pytest.mark.parametrize("tag", ["latest", "-1", "1@", "1@@2", "99999999999999999999", "1.5", "%00"])
def test_a_tag_that_is_no_version_is_refused(api: Running, tag: str):
    assert api.http.get(f"/v2/repos/sums/version/{tag}").status_code in (400, 404)
