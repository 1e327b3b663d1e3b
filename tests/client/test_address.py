"""Which server and token are used, and what is said when one is missing or would leak."""

from pathlib import Path

import pytest

from rewardsmith.client.address import find_address, normalised
from rewardsmith.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://127.0.0.1:9/", "http://127.0.0.1:9"),
        ("https://rl.example.org/v1", "https://rl.example.org"),
        ("https://rl.example.org/v2/", "https://rl.example.org"),
        ("localhost:9", "http://localhost:9"),
        ("[::1]:9", "http://[::1]:9"),
        ("rl.example.org", "https://rl.example.org"),
    ],
)
def test_addresses_are_completed(given: str, url: str):
    assert normalised(given) == url


@pytest.mark.parametrize("given", ["ftp://x", "http://", "http://host:port", "http://host:99999"])
def test_what_is_no_address_is_refused(given: str):
    with pytest.raises(ConfigError, match="no address of a server"):
        normalised(given)


def test_the_token_is_looked_for_in_the_order_of_the_contract(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("REWARDSMITH_HOME", str(tmp_path))
    (tmp_path / "owner-token").write_text("from-file\n")
    assert find_address().token == "from-file"
    monkeypatch.setenv("PREDIBASE_API_TOKEN", "from-theirs")
    assert find_address().token == "from-theirs"
    monkeypatch.setenv("REWARDSMITH_API_TOKEN", "from-ours\n")
    assert find_address().token == "from-ours"
    assert find_address("given").token == "given"
    assert "REWARDSMITH_API_TOKEN" in find_address().token_origin


def test_the_gateway_of_the_original_is_read_when_ours_is_not_set(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PREDIBASE_GATEWAY", "http://127.0.0.1:1/v1")
    assert find_address("t").url == "http://127.0.0.1:1"
    monkeypatch.setenv("REWARDSMITH_BASE_URL", "http://127.0.0.1:2")
    assert find_address("t").url == "http://127.0.0.1:2"
    assert find_address("t", "http://127.0.0.1:3").url == "http://127.0.0.1:3"


def test_no_token_says_where_one_comes_from():
    with pytest.raises(ConfigError, match=r"owner-token.*rewardsmith serve.*api_token=.*REWARDSMITH_API_TOKEN"):
        find_address()


def test_the_owner_token_goes_to_no_other_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("REWARDSMITH_HOME", str(tmp_path))
    (tmp_path / "owner-token").write_text("secret")
    with pytest.raises(ConfigError, match="only for a server on this machine"):
        find_address(base_url="https://rl.example.org")


def test_a_damaged_token_is_named_before_it_is_sent():
    with pytest.raises(ConfigError, match="argument api_token"):
        find_address("two words")


def test_the_token_is_not_shown():
    assert "secret" not in repr(find_address("secret"))
