"""Packages for reward functions: lines that are refused, locks, environments that are shared, bounded and read-only.

The index is on this machine and its packages are made here; uv and pip are the real ones.
"""

import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from wheels import Index, serving

from rewardsmith.errors import ConfigError, PackageError
from rewardsmith.rewards import installer, packages
from rewardsmith.rewards.packages import at_hand, open_environment, requirements


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """The only index that installers know, and a cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    monkeypatch.setenv("PIP_CACHE_DIR", str(tmp_path / "pip"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("UV_NO_CONFIG", "1")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT", "UV_FIND_LINKS", "UV_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "index").mkdir()
    with serving(tmp_path / "index") as served:
        monkeypatch.setenv("UV_DEFAULT_INDEX", served.url)
        monkeypatch.setenv("PIP_INDEX_URL", served.url)
        yield served


@pytest.fixture(params=["uv", "pip"])
def program(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With pip, this is a machine without uv."""
    if request.param == "pip":
        monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    return str(request.param)


def silent(line: str) -> None:
    pass


def imports(folders: list[Path], program: str) -> str:
    """What a plain interpreter, without any site folder but these, says."""
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path += {[str(f) for f in folders]}; {program}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


# ---- lines


def test_lines_have_one_form_and_one_order() -> None:
    lines = ["Sympy >= 1.13 , <2", "math_verify[antlr4_13_2,Other]==0.8", "numpy"]
    assert requirements(lines) == ["math-verify[antlr4-13-2,other]==0.8", "numpy", "sympy<2,>=1.13"] or (
        requirements(lines) == ["math-verify[Other,antlr4_13_2]==0.8", "numpy", "sympy<2,>=1.13"]
    )
    assert requirements(reversed(lines)) == requirements(lines)
    assert requirements(['numpy; python_version < "3"', 'sympy; python_version >= "3"']) == ["sympy"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("-r requirements.txt", "option of pip"),
        ("-e .", "option of pip"),
        ("--index-url https://evil.example", "option of pip"),
        ("--extra-index-url=https://evil.example", "option of pip"),
        ("sympy @ https://evil.example/sympy.whl", "is a URL"),
        ("sympy@https://evil.example/sympy.whl", "is a URL"),
        ("https://evil.example/sympy.whl", "is a URL"),
        ("git+https://evil.example/sympy", "is a URL"),
        ("sympy @ file:///etc/passwd", "is a URL"),
        ("file:sympy.whl", "is a URL"),
        ("./sympy", "is a path"),
        ("../sympy", "is a path"),
        ("/etc/sympy", "is a path"),
        ("folder\\sympy", "is a path"),
        (".", "is a path"),
        ("sympy-1.13-py3-none-any.whl", "is a path"),
        ("sympy.tar.gz", "is a path"),
        ("requirements.txt", "is a path"),
        ("not a requirement", "no requirement line"),
        ("sympy\n--index-url=x", "no requirement line"),
        ("sympy --hash=sha256:00", "no requirement line"),
        ("sympy; nonsense", "no requirement line"),
        ("", "no requirement line"),
        ("s" * 600, "too long"),
    ],
)
def test_lines_that_are_more_than_a_name_are_refused_by_name(line: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refusal:
        requirements(["numpy", line])
    assert repr(line[:500]) in refusal.value.message and "numpy'" not in refusal.value.message


def test_a_name_that_comes_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'Math\.Verify' names math-verify a second time"):
        requirements(["math_verify>=0.8", "Math.Verify"])
    with pytest.raises(ConfigError, match="101 lines"):
        requirements([f"p{number}" for number in range(101)])


def test_a_marker_cannot_smuggle_a_line(index: Index) -> None:
    with pytest.raises((ConfigError, PackageError)):
        open_environment(["sympy; 'x\n--index-url=y' != os_name"], silent)


# ---- what this interpreter has


def test_what_is_here_is_used_as_it_is(index: Index) -> None:
    for lines in ([], ["packaging"], ["PyDantic>=2", "packaging"], ['nothing-of-this; python_version < "3"']):
        environment = at_hand(lines)
        assert environment is not None and environment.lock == "" and environment.versions == []
        assert any((folder / "pydantic").is_dir() for folder in environment.folders)
        assert open_environment(lines, silent) == environment
    assert index.asked == []


@pytest.mark.parametrize("line", ["pydantic<1", "pydantic[email]", "rs-tiny"])
def test_what_is_not_here_in_that_version_or_with_that_extra_has_to_be_installed(index: Index, line: str) -> None:
    assert at_hand([line]) is None


# ---- installing


def test_a_set_is_locked_with_hashes_installed_once_and_found_again(index: Index, program: str) -> None:
    index.add("rs_tiny", "1.0")
    index.add("rs_tiny", "2.0", requires=["rs-inner>=1"])
    index.add("rs_inner", "1.5")
    said: list[str] = []
    with open_environment(["rs-tiny"], said.append) as first:
        assert sorted(line.replace("_", "-") for line in first.versions) == ["rs-inner 1.5", "rs-tiny 2.0"]
        assert first.lock.count("--hash=sha256:") >= 2
        assert imports(first.folders, "import rs_tiny, rs_inner; print(rs_tiny.version, rs_inner.version)") == "2.0 1.5"
        assert any("rs-tiny" in line.replace("_", "-") or "2 packages" in line for line in said), said
        index.add("rs_tiny", "3.0")
        asked = len(index.asked)
        with at_hand(["rs-tiny"]) as again:  # type: ignore[union-attr]
            assert again.folders == first.folders and len(index.asked) == asked
        with open_environment(["rs-tiny"], silent, lock=first.lock) as locked:
            assert locked.folders == first.folders and len(index.asked) == asked
    with open_environment(["rs-tiny"], silent) as newer:
        assert "3.0" in str(newer.versions) and newer.folders != first.folders


def test_what_cannot_be_had_is_refused_with_the_reason(index: Index, program: str) -> None:
    index.add("rs_tiny", "1.0", requires=["rs-nowhere"])
    for lines, reason in ((["rs-nothing"], "rs-nothing"), (["rs-tiny>=2"], "rs-tiny"), (["rs-tiny"], "rs-nowhere")):
        with pytest.raises(PackageError, match=reason):
            open_environment(lines, silent)
        assert at_hand(lines) is None
    assert not [path for path in packages._cache().iterdir() if path.is_dir() and path.name != "locks"]


def test_nothing_is_built_from_source(index: Index, program: str, tmp_path: Path) -> None:
    trap = tmp_path / "was run"
    setup = f"open({str(trap)!r}, 'w').close()\nfrom setuptools import setup\nsetup(name='rs_source', version='1.0')\n"
    index.add_source("rs_source", "1.0", setup)
    with pytest.raises(PackageError, match=r"rs-source|rs_source"):
        open_environment(["rs-source"], silent)
    assert not trap.exists()


def test_a_wheel_that_is_not_the_locked_one_is_refused(index: Index, program: str) -> None:
    index.add("rs_tiny", "1.0")
    lock = installer.resolve(["rs-tiny"], silent)
    index.add("rs_tiny", "1.0", files={"rs_tiny.py": "version = 'another'"})
    shutil.rmtree(os.environ["UV_CACHE_DIR"], ignore_errors=True)
    shutil.rmtree(os.environ["PIP_CACHE_DIR"], ignore_errors=True)
    with pytest.raises(PackageError, match=r"(?i)hash"):
        open_environment(["rs-tiny"], silent, lock=lock)


def test_code_in_a_pth_file_is_not_run_by_installing(index: Index, program: str, tmp_path: Path) -> None:
    trap = tmp_path / "was run"
    index.add("rs_pth", "1.0", files={"rs_pth.py": "", "rs_pth.pth": f"import os; os.mkdir({str(trap)!r})\n"})
    with open_environment(["rs-pth"], silent) as environment:
        assert (environment.folders[0] / "rs_pth.pth").exists() and not trap.exists()


def test_the_files_are_for_all_to_read_and_nobody_to_write(index: Index) -> None:
    before = os.umask(0o077)
    try:
        index.add("rs_tiny", "1.0", files={"rs_tiny/__init__.py": "", "rs_tiny/data/x.txt": "x"})
        with open_environment(["rs-tiny"], silent) as environment:
            for path in [environment.folders[0], *environment.folders[0].rglob("*")]:
                mode = stat.S_IMODE(path.stat().st_mode)
                assert mode & 0o444 == 0o444 and not mode & 0o022, path
                assert path.is_dir() or (not mode & 0o222 and path.stat().st_nlink == 1), path
    finally:
        os.umask(before)


def test_many_that_want_the_same_set_install_it_once(index: Index) -> None:
    index.add("rs_tiny", "1.0")
    program = (
        "import sys; from rewardsmith.rewards.packages import open_environment; "
        "print(*open_environment(['rs-tiny'], lambda line: None).folders)"
    )
    processes = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    folders = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert len(folders) == 1 and Path(folders.pop()).is_dir()
    assert len([path for path in packages._cache().iterdir() if path.is_dir() and path.name != "locks"]) == 1


def test_the_least_recently_used_ones_go_and_none_that_is_in_use(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        index.add(f"rs_big{number}", "1.0", files={f"rs_big{number}.py": "#" * 100_000})
    folders = []
    for number in range(3):
        with open_environment([f"rs-big{number}"], silent) as environment:
            folders.append(environment.folders[0])
        os.utime(f"{folders[-1]}.lock", (number, number))
    monkeypatch.setattr(packages, "KEPT_BYTES", 250_000)
    with at_hand(["rs-big0"]) as in_use:  # type: ignore[union-attr]
        os.utime(f"{folders[0]}.lock", (0, 0))
        with open_environment(["rs-big3"], silent) as newest:
            assert newest.folders[0].is_dir()
        assert [folder.is_dir() for folder in folders] == [True, False, False] and in_use.folders == folders[:1]
    assert at_hand(["rs-big1"]) is None
    with open_environment(["rs-big1"], silent) as again:
        assert again.folders == folders[1:2] and folders[1].is_dir()


def test_a_set_that_is_too_large_is_refused_and_leaves_nothing(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    index.add("rs_tiny", "1.0")
    monkeypatch.setattr(packages, "LARGEST_BYTES", 10)
    with pytest.raises(PackageError, match="GiB that one set may have"):
        open_environment(["rs-tiny"], silent)
    assert not [path for path in packages._cache().iterdir() if path.is_dir() and path.name != "locks"]


def test_what_a_killed_installation_left_is_removed(index: Index) -> None:
    index.add("rs_tiny", "1.0")
    abandoned, fresh = packages._cache() / "draft-old", packages._cache() / "draft-new"
    for draft in (abandoned, fresh):
        draft.mkdir()
    os.utime(abandoned, (1, 1))
    open_environment(["rs-tiny"], silent).close()
    assert not abandoned.exists() and fresh.exists()


def test_an_installation_ends_when_nobody_wants_it_any_more(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program hangs; whoever is told of its silence can end it."""
    hanging = threading.Event()

    class Unwanted(Exception):
        pass

    def tell(line: str) -> None:
        if line == "":
            hanging.set()
            raise Unwanted

    with socket.create_server(("127.0.0.1", 0)) as mute:
        monkeypatch.setenv("UV_DEFAULT_INDEX", f"http://127.0.0.1:{mute.getsockname()[1]}/")
        began = time.monotonic()
        with pytest.raises(Unwanted):
            open_environment(["rs-tiny"], tell)
        assert hanging.is_set() and time.monotonic() - began < 30


def test_an_installer_that_takes_too_long_is_ended(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installer, "SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        monkeypatch.setenv("UV_DEFAULT_INDEX", f"http://127.0.0.1:{mute.getsockname()[1]}/")
        with pytest.raises(PackageError, match=r"longer than 0\.3 s"):
            open_environment(["rs-tiny"], silent)


def test_a_cache_that_others_can_write_is_not_used(index: Index, tmp_path: Path) -> None:
    packages._cache().chmod(0o777)
    with pytest.raises(PackageError, match="can be written by other users"):
        open_environment(["rs-tiny"], silent)
