"""`rewardsmith reward test`: what is wrong with reward functions, before they cost a run. Works without a server.

The figures and findings come from `rewardsmith.test_rewards`; here files are read and the page is shown.
"""

from __future__ import annotations

import ast
import json
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from rewardsmith.cli.job_config import ConfigFile, Settings, read_config, read_rewards
from rewardsmith.cli.output import connect, console
from rewardsmith.cli.processes import server_part
from rewardsmith.errors import ConfigError, DatasetError, RewardSourceError, ServerUnreachable
from rewardsmith.rehearsal import DEFAULT_ROWS, test_rewards
from rewardsmith.reward_config import RewardFunction, RewardFunctionsConfig
from rewardsmith.rewards.workbench import page
from rewardsmith.rewards.workbench.faults import Origin

app = typer.Typer(name="reward", help="Reward functions before training.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def test(
    file: Annotated[
        Path,
        typer.Argument(
            help="Python file whose top-level functions are the reward functions, or JSON of a RewardFunctionsConfig.",
            show_default=False,
        ),
    ],
    dataset: Annotated[
        str,
        typer.Option(metavar="FILE|NAME", help="Rows: a jsonl, json, csv or parquet file, or a dataset of the server."),
    ],
    completions: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines with row or prompt, and completion; or what `jobs completions --json` prints.",
            show_default=False,
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Sample completions from it: alias, Hugging Face id or folder.", show_default=False
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="At most so many rows, evenly spaced.")] = DEFAULT_ROWS,
    samples: Annotated[
        int | None, typer.Option(min=1, help="With --base-model: completions of each row. [default: num_generations]")
    ] = None,
    config: ConfigFile = None,
    settings: Settings = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="OUT", help="Also write the report to this file.")
    ] = None,
) -> None:
    """Run reward functions over rows; say how they score, fail, take time and can be gamed.

    --config and --set describe the job: num_generations, effective_batch_size and sampling_params count here.
    """
    warnings.simplefilter("ignore")  # what libraries have to say is not for this page
    functions, origins = read_functions(file)
    job = read_config(config, None, settings)
    with server_part(), tempfile.TemporaryDirectory(prefix="rewardsmith-dataset-") as folder:
        report = test_rewards(
            functions,
            _rows(dataset, Path(folder)),
            completions=completions,
            base_model=base_model,
            config=job,
            rows=rows,
            samples=samples,
            origins=origins,
        )
    for line in page.lines(report):
        console().print(Text(line.text, line.style), soft_wrap=True)
    if json_file is not None:
        json_file.write_text(json.dumps(asdict(report), indent=2) + "\n")


def read_functions(file: Path) -> tuple[RewardFunctionsConfig, dict[str, Origin]]:
    """The functions in a file, and where in it each begins. Raises ConfigError or RewardSourceError with the lines."""
    text = _text(file)
    if file.suffix != ".py":
        try:
            return RewardFunctionsConfig.of(json.loads(text)), {}
        except json.JSONDecodeError as error:
            raise ConfigError(f"{file}, line {error.lineno}: {error.msg}; a Python file is named .py") from None
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise RewardSourceError(f"{file}, line {error.lineno}: {error.msg}") from None
    found = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    if not found:
        raise ConfigError(f"{file} has no top-level function (prompt, completion, example)")
    functions: dict[str, RewardFunction] = {}
    problems = []
    for name in found:
        try:
            functions |= read_rewards(f"{file}:{name}")
        except RewardSourceError as error:
            problems.append(error.message)
    if problems:
        hint = "every top-level function of the file is a reward function; helper functions go inside the one they help"
        raise RewardSourceError("\n".join([*problems, hint]))
    # Decorators are refused, so the text of each function begins with its `def`.
    return RewardFunctionsConfig(functions=functions), {
        name: Origin(str(file), node.lineno) for name, node in found.items()
    }


def _text(file: Path) -> str:
    try:
        return file.expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text (byte {error.start})") from None


def _rows(dataset: str, folder: Path) -> Path:
    """The file of rows; a dataset of the server is saved in `folder`."""
    from rewardsmith.store.dataset_file import FORMATS

    path = Path(dataset).expanduser()
    if path.is_file() or path.suffix.lower() in FORMATS:
        return path
    try:
        return connect().datasets.download(dataset, dest=folder)
    except (ConfigError, ServerUnreachable) as error:
        raise DatasetError(f"there is no file {dataset!r}, and no server to ask for that dataset: {error}") from None
