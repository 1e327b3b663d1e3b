"""`rewardsmith sandbox`: how this machine isolates reward functions, with the evidence. Works without a server."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rewardsmith import wire
from rewardsmith.cli.output import AsJson, console, print_json
from rewardsmith.client.view import printable
from rewardsmith.rewards.sandbox import probe
from rewardsmith.rewards.sandbox.tiers import Tier

STYLES = {"on": "green", "partial": "yellow", "off": "bold red"}


def sandbox(
    fresh: Annotated[bool, typer.Option("--fresh", help="Attack a sandbox again, do not read the cache.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say how this machine isolates reward functions, and prove it."""
    report = probe.report(fresh)
    if as_json:
        print_json(report)
    else:
        show(report, console())
    raise typer.Exit(0 if Tier[report.tier] >= Tier.S1 else 1)


def show(report: wire.SandboxReport, out: Console) -> None:
    style = STYLES["on" if Tier[report.tier] >= Tier.S1 else "off"]
    out.print(Text.assemble(("Tier ", "bold"), (report.tier, style), f": {report.made_of}"))
    out.print(Text(f"It does not stop: {report.not_stopped}.", "dim"))
    if report.tier == "S0":
        out.print(Text("This is no sandbox: run only reward functions that you trust.", STYLES["off"]))

    rows = Table.grid(padding=(0, 2, 0, 0))
    for row in report.protections:
        rows.add_row(Text(row.state, STYLES[row.state]), row.name, Text(printable(row.evidence), "dim"))
        if row.reason:
            rows.add_row("", "", Text(printable(f"{row.reason[0].upper()}{row.reason[1:]}."), STYLES[row.state]))
    _print(out, "What was tried in a sandbox, and what came of it", rows)

    if report.obstacles:
        rows = Table.grid(padding=(0, 2, 0, 0))
        for obstacle in report.obstacles:
            rows.add_row(obstacle.tier, Text(printable(f"{obstacle.reason}. {obstacle.remedy}".strip())))
        _print(out, "What keeps a higher tier away", rows)

    rows = Table.grid(padding=(0, 2, 0, 0))
    without = "" if report.proc else ", without a /proc of its own"
    rows.add_row("started as", Text(f"{report.user}, then: {', '.join(report.hardened) or 'nothing'}{without}", "dim"))
    rows.add_row("machine", Text(printable(f"{report.kernel}, Python {report.python}"), "dim"))
    rows.add_row("bubblewrap", Text(printable(report.bubblewrap or "not installed"), "dim"))
    rows.add_row("took", Text(f"{report.seconds:.2f} s; `--fresh` asks again", "dim"))
    _print(out, "On this machine", rows)


def _print(out: Console, heading: str, rows: Table) -> None:
    out.print()
    out.print(Text(heading, "bold"))
    out.print(Padding(rows, (0, 0, 0, 2), expand=False))
