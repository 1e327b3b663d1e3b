"""`rewardsmith estimate`: does a run fit this machine, and how long does a step take. Works without a server.

The figures come from `train.estimate`; here they are asked for and shown.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from rewardsmith import catalog
from rewardsmith.cli.job_config import ConfigFile, Settings, read_config
from rewardsmith.cli.output import AsJson, console, print_json
from rewardsmith.cli.processes import server_part
from rewardsmith.client.view import printable
from rewardsmith.errors import ConfigError, ModelError
from rewardsmith.quantities import duration, figure, size

if TYPE_CHECKING:
    from rewardsmith.train.estimate import Estimate

BAR_WIDTH = 24
LABEL_WIDTH = 20

BaseModel = Annotated[
    str | None,
    typer.Option(
        "--base-model", metavar="NAME", help="Alias, Hugging Face id, or folder with a config.json.", show_default=False
    ),
]
PromptTokens = Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")]
CompletionTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens of a completion, on average. [default: sampling_params.max_tokens]"),
]


def estimate(
    base_model: BaseModel = None,
    config: ConfigFile = None,
    settings: Settings = None,
    prompt_tokens: PromptTokens = 256,
    completion_tokens: CompletionTokens = None,
    as_json: AsJson = False,
) -> None:
    """Say whether a run fits this machine, and how long it takes."""
    given = [*(settings or []), *([f"base_model={base_model}"] if base_model else [])]
    wanted = read_config(config, None, given)
    if wanted.base_model is None:
        raise ConfigError("which model? Name it with --base-model, or as base_model in the config")
    # As a job's process does, before torch is imported; what libraries have to say is not for this page.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    warnings.simplefilter("ignore")
    with server_part():
        from rewardsmith.train import estimate as estimating

    try:
        source = catalog.source_of(wanted.base_model)
        found = estimating.estimate(source, wanted, prompt_tokens, completion_tokens)
    except ModelError as error:
        raise ConfigError(error.message) from None
    if as_json:
        print_json(_plain(found))
    else:
        show(wanted.base_model, found, console())
    raise typer.Exit(0 if found.memory.fits else 1)


def show(name: str, found: Estimate, out: Console) -> None:
    for line in _lines(name, found):
        out.print(line, soft_wrap=True)


def _lines(name: str, found: Estimate) -> Iterator[Text]:
    shape, memory = found.shape, found.memory
    weights = f"{shape.weights / 1e9:.1f} billion" if shape.weights >= 1e9 else f"{shape.weights / 1e6:.1f} million"
    yield Text.assemble((printable(name), "bold"), f"  {shape.family}, {shape.layers} layers, {weights} parameters")
    yield Text()
    free = f"{size(memory.peak)} at the peak, {size(memory.available)} are free"
    yield Text(f"It fits: {free}.", "green") if memory.fits else Text(f"It does not fit: {free}.", "bold red")
    parts = {**memory.parts, "generation or update": max(memory.generation, memory.update)}
    yield from _bars({part: float(count) for part, count in parts.items() if count}, size)
    yield Text()
    if found.seconds is None or found.per_step is None:
        yield Text(f"How long a step takes was not measured: {found.unmeasured}.")
    else:
        total = "" if found.total is None else f", {found.total_steps} steps about {duration(found.total)}"
        yield Text(f"A step takes about {figure(found.per_step)} s{total}.", "bold")
        yield from _bars(found.seconds, lambda seconds: f"{figure(seconds)} s")
        yield _detail("", "reward functions, evaluations and checkpoints come on top")
    yield Text()
    yield from _grounds(found)
    if found.advice:
        yield Text()
        yield Text("What would make it fit:" if not memory.fits else "What would make it faster:", "bold")
        yield from (Text(f"  {advice}") for advice in found.advice)


def _grounds(found: Estimate) -> Iterator[Text]:
    """What the figures rest on."""
    load = found.load
    lengths = f"{load.prompt_tokens} + {load.completion_tokens} tokens"
    limit = f", at most {load.longest}" if load.longest > load.completion_tokens else ""
    yield Text("This rests on", "bold")
    yield _detail("a step", f"{load.prompts} prompt(s) x {load.group} completions of {lengths}{limit}")
    yield _detail("machine", f"{found.device}, {found.threads} thread(s) for each of {found.ranks} rank(s)")
    if found.path:
        yield _detail("path", found.path)
        beside = "applied beside the weights" + ", which is slower than what was timed" * (found.device == "cpu")
        yield _detail("adapter", "merged into a copy of the weights" if found.memory.parts["merged copy"] else beside)
    yield _detail("micro-batch", f"up to {found.memory.micro_batch_tokens} tokens in each rank")
    yield from (_detail("note", notice) for notice in found.notices)


def _bars(values: Mapping[str, float], text: Callable[[float], str]) -> Iterator[Text]:
    most = max(values.values())
    for label, value in values.items():
        yield _detail(label, f"{text(value):>8}  ", "━" * round(BAR_WIDTH * value / most))


def _detail(label: str, text: str, bar: str = "") -> Text:
    return Text.assemble((f"  {label:<{LABEL_WIDTH}}  ", "dim"), printable(text), (bar, "cyan"))


def _plain(found: Estimate) -> dict[str, Any]:
    fields = asdict(found)
    fields["memory"] |= {"peak": found.memory.peak, "fits": found.memory.fits}
    return fields | {"seconds_per_step": found.per_step, "seconds_in_all": found.total}
