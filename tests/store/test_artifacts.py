import io
import zipfile
from pathlib import Path

import pytest

from rewardsmith.errors import ConfigError, Conflict, NotFound
from rewardsmith.store.artifacts import Artifacts


@pytest.fixture(params=["folder", "folder with odd name", "memory"])
def artifacts(request: pytest.FixtureRequest, tmp_path: Path) -> Artifacts:
    if request.param == "memory":
        return Artifacts("memory:///")
    return Artifacts((tmp_path / ("plain" if request.param == "folder" else "a [b]* %20 ü")).as_uri())


def test_a_file_is_written_once(artifacts: Artifacts, tmp_path: Path) -> None:
    artifacts.put("a/b/one.bin", b"one")
    with pytest.raises(Conflict, match=r"'a/b/one\.bin' exists"):
        artifacts.put("a/b/one.bin", b"two")
    assert artifacts.get("a/b/one.bin") == b"one"
    (tmp_path / "big").write_bytes(b"x" * 10_000_000)
    artifacts.put("a/big", tmp_path / "big")
    with pytest.raises(Conflict):
        artifacts.put("a/big", tmp_path / "big")
    assert artifacts.fetch("a/big").stat().st_size == 10_000_000


def test_files_are_listed_fetched_and_deleted(artifacts: Artifacts) -> None:
    for path in ("a/2", "a/b/1", "ab/3"):
        artifacts.put(path, path.encode())
    assert artifacts.list("a") == ["a/2", "a/b/1"]
    assert artifacts.exists("a/2") and not artifacts.exists("a") and not artifacts.exists("a/3")
    fetched = artifacts.fetch("a/b/1")
    assert fetched.read_bytes() == b"a/b/1" and fetched.is_relative_to(artifacts.local_root)
    artifacts.delete("a")
    assert artifacts.list("a") == [] and artifacts.list("ab") == ["ab/3"]
    artifacts.delete("a")
    with pytest.raises(NotFound, match="no artifact 'a/2'"):
        artifacts.get("a/2")
    with pytest.raises(NotFound):
        artifacts.fetch("nowhere/x")


def test_a_folder_becomes_a_zip_with_names_relative_to_it(artifacts: Artifacts) -> None:
    artifacts.put("adapters/3/adapter_config.json", b"{}")
    artifacts.put("adapters/3/sub/weights", b"w" * 3_000_000)
    file = io.BytesIO()
    artifacts.zip_folder("adapters/3", file)
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        assert {entry.filename: entry.file_size for entry in archive.infolist()} == {
            "adapter_config.json": 2,
            "sub/weights": 3_000_000,
        }
    with pytest.raises(NotFound):
        artifacts.zip_folder("adapters/4", io.BytesIO())


@pytest.mark.parametrize(
    "path", ["../x", "a/../../x", "/etc/passwd", "a//b", "a/", "", ".", "a/.hidden", "a\\b", "a\nb"]
)
def test_paths_that_could_lead_outside_are_refused(artifacts: Artifacts, path: str) -> None:
    for name in ("get", "exists", "list", "delete", "local_path", "fetch"):
        with pytest.raises(ConfigError, match="artifact path"):
            getattr(artifacts, name)(path)
    with pytest.raises(ConfigError, match="artifact path"):
        artifacts.put(path, b"")


def test_copies_of_remote_files_stay_within_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewardsmith.store.artifacts.CACHE_BYTES", 2500)
    artifacts = Artifacts("memory:///")
    for name in "abcd":
        artifacts.put(f"f/{name}", name.encode() * 1000)
        assert artifacts.fetch(f"f/{name}").read_bytes() == name.encode() * 1000
    copies = [file for file in artifacts.local_root.iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in copies) <= 2500
    assert artifacts.fetch("f/a").read_bytes() == b"a" * 1000


@pytest.mark.parametrize("url", ["s3://", "ftp://host/x", "nonsense"])
def test_urls_that_are_no_store_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="artifacts URL"):
        Artifacts(url)
