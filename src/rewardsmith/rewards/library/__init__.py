"""Rewards to copy, or to import by name: `from rewardsmith.rewards.library import numeric_match`.

Each is an ordinary reward function that stands alone: its text travels like that of your own, and can be copied and
changed. Settings are its keyword-only parameters; `with_settings` writes other values for them into the text. Every
docstring says the range, the columns read, the settings, and how a model can game it. Nothing here runs a reward.
"""

from rewardsmith.rewards.library.answers import exact_match, numeric_match
from rewardsmith.rewards.library.code import code_tests
from rewardsmith.rewards.library.form import format_tags, regex_match
from rewardsmith.rewards.library.judge import llm_judge
from rewardsmith.rewards.library.schema import json_schema
from rewardsmith.rewards.library.settings import with_settings
from rewardsmith.rewards.library.shaping import repetition_penalty, soft_overlong
from rewardsmith.rewards.library.sql import sql_match
from rewardsmith.rewards.library.tools import tool_call

__all__ = [
    "code_tests",
    "exact_match",
    "format_tags",
    "json_schema",
    "llm_judge",
    "numeric_match",
    "regex_match",
    "repetition_penalty",
    "soft_overlong",
    "sql_match",
    "tool_call",
    "with_settings",
]
