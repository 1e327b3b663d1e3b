"""What is wrong with a set of reward functions, why it matters, what to change: rules over the figures of a report.

One rule is one function; each says for itself how serious it is. Nothing is run or measured here.
"""

from __future__ import annotations

from rewardsmith.rewards.workbench import call_findings, probe_findings, value_findings
from rewardsmith.rewards.workbench.report import SEVERITIES, Finding, Report

RULES = (
    call_findings.failing,
    value_findings.constant,
    probe_findings.gameable,
    call_findings.not_repeatable,
    value_findings.no_signal,
    probe_findings.reference_missed,
    call_findings.failing_on_probes,
    call_findings.failure_pays,
    value_findings.disagree,
    value_findings.out_of_range,
    value_findings.left_out,
    call_findings.infrastructure,
    call_findings.slow,
    value_findings.thin,
)


def find(report: Report) -> list[Finding]:
    """The most serious first, else in the order of the rules."""
    found = [finding for rule in RULES for finding in rule(report)]
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))
