"""Who may import whom: the table of the design, checked on the source. Imports inside functions count too."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "rewardsmith"
HEAVY = {
    "torch", "transformers", "peft", "safetensors", "numpy", "fastapi", "starlette", "uvicorn", "sqlalchemy", "alembic",
    "pyarrow", "duckdb", "obstore", "ray", "httpx", "rich", "typer", "pydantic", "psutil", "pandas", "websockets",
    "packaging",
}  # fmt: skip

# module prefix -> (what it may import from the package, which third parties). The longest matching prefix decides.
TABLE: dict[str, tuple[set[str], set[str]]] = {
    "": ({"client", "config", "errors", "reward_config", "rehearsal"}, set()),
    "machine": (set(), set()),
    "rehearsal": (
        {"catalog", "config", "errors", "reward_config", "rewards", "rollout", "store.dataset_file", "train", "wire"},
        set(),
    ),
    "home": (set(), set()),
    "errors": (set(), set()),
    "quantities": (set(), set()),
    "section": ({"errors"}, {"pydantic"}),
    "config": ({"errors", "section", "reward_config"}, {"pydantic"}),
    "reward_config": ({"errors", "section", "rewards.source"}, {"pydantic"}),
    "catalog": ({"errors"}, set()),
    "wire": ({"errors", "wire"}, {"pydantic"}),
    "rewards.source": (set(), set()),
    "rewards.inside": ({"rewards.inside"}, set()),
    "rewards.sandbox": ({"errors", "wire", "rewards.inside", "rewards.sandbox"}, set()),
    "rewards": ({"errors", "config", "machine", "reward_config", "wire", "rewards"}, set()),
    "rewards.packages": ({"errors", "rewards"}, {"packaging"}),
    "client": (
        {"errors", "config", "home", "catalog", "wire", "quantities", "rewards.source", "client"},
        {"httpx", "rich", "pydantic"},
    ),
    "store": (
        {"errors", "config", "home", "wire", "store"},
        {"sqlalchemy", "alembic", "pyarrow", "duckdb", "obstore", "pydantic"},
    ),
    "rollout": ({"errors", "config", "catalog", "machine", "rollout"}, {"torch", "transformers", "peft"}),
    "train": (
        {"errors", "config", "machine", "wire", "quantities", "reward_config", "rollout", "rewards", "train"},
        {"torch", "transformers", "peft", "safetensors", "numpy", "pyarrow", "obstore", "httpx"},
    ),
    "jobs": ({"errors", "config", "wire", "store", "jobs"}, {"psutil", "httpx"}),
    "jobs.entry": ({"errors", "config", "machine", "wire", "train", "rollout", "rewards"}, {"torch"}),
    "server": (
        {"errors", "config", "reward_config", "home", "catalog", "wire", "store", "rewards", "jobs", "server"},
        {"fastapi", "starlette", "uvicorn", "pydantic", "websockets", "packaging"},
    ),
    "demo": ({"demo", "client", "config", "reward_config", "errors", "home", "wire"}, {"rich"}),
    "doctor": (
        {"errors", "config", "home", "catalog", "client", "rewards.sandbox"},
        {"rich", "psutil", "torch", "packaging"},
    ),
    "__main__": ({"cli"}, set()),
    "cli": ({"*"}, {"typer", "rich"}),
}


def name_of(path: Path) -> str:
    parts = list(path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def rule_for(module: str) -> tuple[set[str], set[str]]:
    prefixes = [p for p in TABLE if p and (module == p or module.startswith(p + "."))]
    return TABLE[max(prefixes, key=len)] if prefixes else TABLE[""]


def imported(path: Path, module: str) -> list[tuple[int, str]]:
    """Dotted names a file imports; `from a import b` gives a.b when b is a module of the package."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join(["rewardsmith", *filter(None, package), *filter(None, [base])])
            for alias in node.names:
                inner = base.removeprefix("rewardsmith").lstrip(".").replace(".", "/")
                is_module = base.startswith("rewardsmith") and (
                    (SOURCE / inner / f"{alias.name}.py").exists() or (SOURCE / inner / alias.name).is_dir()
                )
                found.append((node.lineno, f"{base}.{alias.name}" if is_module else base))
    return found


def allowed_inside(target: str, allowed: set[str]) -> bool:
    # The package's root is for users: inside, a name comes from the module that has it.
    return "*" in allowed or any(target == a or target.startswith(a + ".") for a in allowed)


def test_imports_follow_the_table():
    wrong = []
    for path in sorted(SOURCE.rglob("*.py")):
        module = name_of(path)
        inside, third_parties = rule_for(module)
        for line, name in imported(path, module):
            top = name.split(".")[0]
            if top == "rewardsmith":
                target = name.removeprefix("rewardsmith").lstrip(".")
                if not allowed_inside(target, inside):
                    wrong.append(f"{path.relative_to(SOURCE)}:{line} imports {name}")
                if module.split(".")[0] == "server" and target == "jobs.entry":
                    wrong.append(f"{path.relative_to(SOURCE)}:{line} imports the job's entry point")
            elif top in HEAVY and top not in third_parties:
                wrong.append(f"{path.relative_to(SOURCE)}:{line} imports {name}")
    assert not wrong, "imports against the table of the design:\n" + "\n".join(wrong)


def test_every_module_says_what_it_is():
    silent = [
        str(path.relative_to(SOURCE))
        for path in sorted(SOURCE.rglob("*.py"))
        if not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent, f"modules without an opening docstring: {silent}"


def test_no_file_is_too_long_or_vaguely_named():
    vague = {"utils", "util", "helpers", "helper", "misc", "common", "manager"}
    files = [p for p in sorted(SOURCE.rglob("*.py"))]
    assert not [str(p) for p in files if p.stem in vague]
    assert not [str(p) for p in files if len(p.read_text().splitlines()) > 400]
