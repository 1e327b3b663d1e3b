"""The public names are exactly `__all__`, the documentation knows each, and importing them loads nothing heavy."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import rewardsmith

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "fastapi", "sqlalchemy", "ray", "pyarrow", "duckdb", "numpy", "pandas", "typer")


def test_all_is_what_can_be_imported():
    public = {
        name
        for name, value in vars(rewardsmith).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert public | {"__version__"} == set(rewardsmith.__all__)
    assert list(rewardsmith.__all__) == sorted(rewardsmith.__all__)


def test_every_name_is_documented():
    text = "".join(path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
    assert [name for name in rewardsmith.__all__ if not name.startswith("__") and name not in text] == []


def test_names_say_what_they_are():
    for name in rewardsmith.__all__:
        value = getattr(rewardsmith, name)
        if isinstance(value, type) and not issubclass(value, Exception):
            assert value.__doc__, name


def test_importing_the_sdk_loads_nothing_heavy():
    program = "import sys, rewardsmith; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert [name for name in HEAVY if name in loaded] == []
