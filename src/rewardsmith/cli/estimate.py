"""`rewardsmith estimate`: does a run fit this machine, and how long does a step take. Works without a server.

The figures come from `train.estimate`; here they are asked for and shown.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rewardsmith import catalog
from rewardsmith.cli.job_config import ConfigFile, Settings, read_config
from rewardsmith.cli.output import AsJson, console, print_json
from rewardsmith.cli.processes import server_part
from rewardsmith.client.view import printable
from rewardsmith.errors import ConfigError, ModelError
from rewardsmith.quantities import duration, figure, size

if TYPE_CHECKING:
    from rewardsmith.train.estimate.estimate import Estimate

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
    source = catalog.source_of(wanted.base_model)
    # As a job's process does, before torch is imported; what libraries have to say is not for this page.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    warnings.simplefilter("ignore")
    with server_part():
        from rewardsmith.train.estimate import estimate as estimating

    try:
        found = estimating.estimate(source, wanted, prompt_tokens, completion_tokens)
    except ModelError as error:
        raise ConfigError(error.message) from None
    if as_json:
        print_json(_plain(found))
    else:
        show(wanted.base_model, found, console())
    raise typer.Exit(0 if found.memory.fits else 1)


def show(name: str, found: Estimate, out: Console) -> None:
    shape, memory = found.shape, found.memory
    weights = f"{shape.weights / 1e9:.1f} billion" if shape.weights >= 1e9 else f"{shape.weights / 1e6:.1f} million"
    facts = f"  {shape.family}, {shape.layers} layers, {weights} parameters"
    out.print(Text.assemble((printable(name), "bold"), facts))

    free = f"{size(memory.peak)} at the peak, {size(memory.available)} are free"
    fits = Text(f"It fits: {free}.", "green") if memory.fits else Text(f"It does not fit: {free}.", "bold red")
    parts = {**memory.parts, "generation or update": max(memory.generation, memory.update)}
    _print(out, fits, _bars({part: float(count) for part, count in parts.items() if count}, size))

    if found.seconds is None or found.per_step is None:
        out.print(f"\nHow long a step takes was not measured: {found.unmeasured}.", markup=False)
    else:
        total = "" if found.total is None else f", {found.total_steps} steps about {duration(found.total)}"
        heading = Text(f"A step takes about {figure(found.per_step)} s{total}.", "bold")
        on_top = ("", Text("reward functions, evaluations, checkpoints come on top"))
        _print(out, heading, [*_bars(found.seconds, lambda seconds: f"{figure(seconds)} s"), on_top])

    _print(out, Text("This rests on", "bold"), [(name, Text(printable(text))) for name, text in _grounds(found)])
    if found.advice:
        heading = Text(f"What would make it {'faster' if memory.fits else 'fit'}", "bold")
        _print(out, heading, [("", Text(printable(advice))) for advice in found.advice], label_width=0)


def _print(out: Console, heading: Text, rows: Iterable[tuple[str, Text]], label_width: int = LABEL_WIDTH) -> None:
    """A block of lines; a text that is too long for the terminal goes on below itself."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=label_width, style="dim", no_wrap=True)
    table.add_column()
    for label, text in rows:
        table.add_row(label, text)
    out.print()
    out.print(heading)
    out.print(Padding(table, (0, 0, 0, 2 if label_width else 0), expand=False))


def _bars(values: Mapping[str, float], text: Callable[[float], str]) -> Iterator[tuple[str, Text]]:
    most = max(values.values())
    for label, value in values.items():
        yield label, Text.assemble(f"{text(value):>8}  ", ("━" * round(BAR_WIDTH * value / most), "cyan"))


def _grounds(found: Estimate) -> Iterator[tuple[str, str]]:
    """What the figures rest on."""
    load = found.load
    lengths = f"{load.prompt_tokens} + {load.completion_tokens} tokens"
    limit = f", at most {load.longest}" if load.longest > load.completion_tokens else ""
    yield "a step", f"{load.prompts} x {load.group} completions of {lengths}{limit}"
    yield "machine", f"{found.device}, {found.threads} thread(s) for each of {found.ranks} rank(s)"
    if found.path:
        yield "path", found.path
        beside = "applied beside the weights" + ", which is slower than what was timed" * (found.device == "cpu")
        yield "adapter", "merged into a copy of the weights" if found.memory.parts["merged copy"] else beside
    yield "micro-batch", f"up to {found.memory.micro_batch_tokens} tokens in each rank"
    yield from (("note", notice) for notice in found.notices)


def _plain(found: Estimate) -> dict[str, Any]:
    fields = asdict(found)
    fields["memory"] |= {"peak": found.memory.peak, "fits": found.memory.fits}
    return fields | {"seconds_per_step": found.per_step, "seconds_in_all": found.total}
