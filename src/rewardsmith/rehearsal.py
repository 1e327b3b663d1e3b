"""`rewardsmith.test_rewards`: reward functions tried on rows of a dataset, on this machine and before any training.

Rows come from a file or as dicts; completions as lists, from a file (also what `rewardsmith jobs completions --json`
prints), freshly sampled from a base model, or not at all. The examination itself is `rewards.workbench`. Needs no
server; torch is loaded only to sample, pyarrow only to read a file of rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewardsmith import catalog
from rewardsmith.config import GRPOConfig
from rewardsmith.errors import ConfigError, DatasetError
from rewardsmith.reward_config import RewardFunctionsConfig

if TYPE_CHECKING:
    from rewardsmith.rewards.workbench.faults import Origin
    from rewardsmith.rewards.workbench.report import Report

Row = dict[str, Any]
Rows = str | Path | Sequence[Mapping[str, Any]]
Completions = str | Path | Sequence[Sequence[str]]
DEFAULT_ROWS = 20


def test_rewards(
    reward_fns: Any,
    dataset: Rows,
    *,
    completions: Completions | None = None,
    base_model: str | None = None,
    config: GRPOConfig | Mapping[str, Any] | None = None,
    rows: int = DEFAULT_ROWS,
    samples: int | None = None,
    origins: Mapping[str, Origin] | None = None,
) -> Report:
    """Runs reward functions over `rows` rows of a dataset and says what is wrong with them; `print` the answer.

    `reward_fns` takes every form that GRPOConfig takes. `dataset` is a file of rows or a list of them; `completions`
    one list of texts for each of its rows, or a file. With `base_model` (alias, Hugging Face id or folder) `samples`
    completions of each row are drawn, by default as many as the job's groups have. Without either only the probes are
    run. `config` is that of the job: its group size, batch size, sampling and prompt settings count.

    What takes time is announced on standard error. Raises ConfigError, RewardSourceError, DatasetError with what is
    wrong and where, ModelError when the base model cannot be used, PackageError when packages cannot be installed,
    RewardPoolError when a function cannot be loaded, SandboxError where this machine must not run user code.
    """
    from rewardsmith.rewards.pool import Group
    from rewardsmith.rewards.workbench.examine import examine
    from rewardsmith.wire import RevisionFunction

    job = config if isinstance(config, GRPOConfig) else GRPOConfig(**(config or {}))
    if completions is not None and base_model is not None:
        raise ConfigError("give completions or a base model to sample from, not both")
    if rows < 1 or (samples is not None and samples < 1):
        raise ConfigError("rows and samples count from 1")
    functions = RewardFunctionsConfig.of(reward_fns)
    every_row = _rows(dataset)
    notes: list[str] = []
    if completions is not None:
        recorded = _recorded(completions, every_row)
        chosen = set(_spread(sorted({number for number, _ in recorded}), rows))
        answers = [(number, texts) for number, texts in recorded if number in chosen]
        source = str(completions) if isinstance(completions, str | Path) else "as given"
    elif base_model is not None:
        numbered = [(number, every_row[number]) for number in _spread(range(len(every_row)), rows)]
        answers = _sampled(base_model, numbered, job, samples or job.num_generations, notes)
        source = f"sampled from {base_model}"
    else:
        answers, source = [(number, []) for number in _spread(range(len(every_row)), rows)], "none"
    revision = [
        RevisionFunction(
            name=name,
            source=function.source,
            source_sha256=hashlib.sha256(function.source.encode()).hexdigest(),
            **function.model_dump(exclude={"encoded_fn"}),
        )
        for name, function in functions.functions.items()
    ]
    with _packages(functions.runtime.packages) as site_dirs:
        return examine(
            revision,
            [Group(every_row[number]["prompt"], every_row[number], texts) for number, texts in answers],
            rows=[number for number, _ in answers],
            config=job,
            runtime=functions.runtime,
            site_dirs=site_dirs,
            origins=origins,
            source=source,
            notes=notes,
            notice=_say,
        )


test_rewards.__test__ = False  # type: ignore[attr-defined]  # its name must not make it a test where users import it


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


@contextmanager
def _packages(lines: Sequence[str]) -> Iterator[list[Path] | None]:
    """Where functions import from: what they ask for is installed as it is for a job. Raises PackageError."""
    if not lines:
        yield None
        return
    from rewardsmith.rewards.packages import open_environment

    _say(f"packages: {', '.join(lines)}")
    with open_environment(lines, lambda line: _say(line) if line else None) as environment:
        yield environment.folders


def _spread(numbers: Sequence[int], count: int) -> list[int]:
    """At most `count` of them, evenly spaced: the first rows of a file are often alike."""
    count = min(count, len(numbers))
    return [numbers[place * len(numbers) // count] for place in range(count)]


# ---- rows -----------------------------------------------------------------------------------------------------------


def _rows(dataset: Rows) -> list[Row]:
    """All rows, checked as an upload is. Raises DatasetError."""
    if isinstance(dataset, str | Path):
        return _rows_of(Path(dataset).expanduser())
    checked = []
    for number, row in enumerate(dataset):
        if not isinstance(row, Mapping) or not isinstance(row.get("prompt"), str):
            raise DatasetError(f"row {number}: a row is a dict with a text under `prompt`")
        try:
            checked.append(json.loads(json.dumps(dict(row), allow_nan=False)))
        except (TypeError, ValueError) as error:
            raise DatasetError(f"row {number} has a value that JSON cannot hold: {error}") from None
    if not checked:
        raise DatasetError("there are no rows")
    return checked


def _rows_of(file: Path) -> list[Row]:
    from rewardsmith.store.dataset_file import check_file

    if not file.is_file():
        raise DatasetError(f"there is no file {file}")
    with tempfile.TemporaryDirectory(prefix="rewardsmith-rows-") as folder:
        canonical = Path(folder) / "rows.jsonl"
        check_file(file, file.name, canonical, max_bytes=sys.maxsize)
        with canonical.open("rb") as lines:
            return [json.loads(line) for line in lines]


# ---- completions ----------------------------------------------------------------------------------------------------

Answers = list[tuple[int, list[str]]]  # number of the row, a group of completions


def _recorded(completions: Completions, rows: Sequence[Row]) -> Answers:
    """Raises DatasetError naming the entry that is wrong."""
    if isinstance(completions, str | Path):
        return _groups(_entries(Path(completions).expanduser()), rows)
    if len(completions) != len(rows):
        raise DatasetError(f"{len(completions)} lists of completions for {len(rows)} rows; give one for each row")
    for number, texts in enumerate(completions):
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise DatasetError(f"the completions of row {number} are no list of texts")
    found = [(number, list(texts)) for number, texts in enumerate(completions) if texts]
    if not found:
        raise DatasetError("there is no completion")
    return found


def _entries(file: Path) -> list[tuple[str, Any]]:
    """Of JSON lines, or of one JSON list, each with its place."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DatasetError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DatasetError(f"{file} is not UTF-8 text (byte {error.start})") from None
    if text.lstrip().startswith("["):
        try:
            return [(f"{file}, entry {number}", entry) for number, entry in enumerate(json.loads(text), 1)]
        except json.JSONDecodeError as error:
            raise DatasetError(f"{file}, line {error.lineno}: {error.msg}") from None
    entries = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                entries.append((f"{file}, line {number}", json.loads(line)))
            except json.JSONDecodeError as error:
                raise DatasetError(f"{file}, line {number}: {error.msg}") from None
    return entries


def _groups(entries: Sequence[tuple[str, Any]], rows: Sequence[Row]) -> Answers:
    """Completions of one row make a group; where they come from a run, those of one step."""
    by_prompt: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        by_prompt.setdefault(row["prompt"], []).append(number)
    groups: dict[tuple[int, Any, Any], list[str]] = {}
    for place, entry in entries:
        if not isinstance(entry, dict):
            raise DatasetError(f"{place}: an entry is an object with `row` or `prompt`, and `completion`")
        texts = entry.get("completions", [entry.get("completion")])
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise DatasetError(f"{place}: `completion` is a text, `completions` a list of texts")
        number = _row_of(place, entry, rows, by_prompt)
        groups.setdefault((number, entry.get("step"), entry.get("phase")), []).extend(texts)
    if not groups:
        raise DatasetError("there is no completion in the file")
    return [(number, texts) for (number, _, _), texts in groups.items()]


def _row_of(place: str, entry: Row, rows: Sequence[Row], by_prompt: Mapping[str, Sequence[int]]) -> int:
    number, prompt = entry.get("row"), entry.get("prompt")
    if isinstance(number, int) and not isinstance(number, bool):
        if not 0 <= number < len(rows):
            raise DatasetError(f"{place}: there is no row {number}; the dataset has rows 0 to {len(rows) - 1}")
        if prompt is not None and prompt != rows[number]["prompt"]:
            raise DatasetError(f"{place}: row {number} of the dataset has another prompt; is it the same dataset?")
        return number
    if not isinstance(prompt, str):
        raise DatasetError(f"{place}: `row` (a number from 0) or `prompt` has to say whose completion it is")
    found = by_prompt.get(prompt, [])
    if len(found) != 1:
        problem = f"is that of rows {', '.join(map(str, found[:5]))}; name one with `row`" if found else "is of no row"
        raise DatasetError(f"{place}: its prompt {problem}")
    return found[0]


def _sampled(
    base_model: str, numbered: Sequence[tuple[int, Row]], config: GRPOConfig, samples: int, notes: list[str]
) -> Answers:
    """`samples` completions of each row by the engine that a job would sample with. Raises ModelError."""
    source = catalog.source_of(base_model)
    _say(f"sampling {len(numbered)} x {samples} completions from {base_model}; this takes a while without a GPU")
    # As a job's process does, before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from rewardsmith.rollout.engine import context_of
    from rewardsmith.rollout.prompts import make_prompts
    from rewardsmith.train.learner import Learner
    from rewardsmith.train.model import load_base
    from rewardsmith.train.parallel.ranks import Ranks
    from rewardsmith.train.samples import draw

    base, tokenizer = load_base(source)
    context = context_of(base)
    limits = [limit for limit in (config.max_prompt_tokens, context and context - 1) if limit]
    prompts, left_out = make_prompts(
        numbered, tokenizer, apply_chat_template=config.apply_chat_template, max_tokens=min(limits, default=None)
    )
    if left_out:
        notes.append(f"{left_out} row(s) left out: their prompts are too long for the model or max_prompt_tokens.")
    if not prompts:
        raise DatasetError("every prompt is too long for the model or max_prompt_tokens")
    # Nothing is trained: an adapter of zeros, as small as there are.
    untrained = config.model_copy(update={"rank": 1, "lora_dropout": 0.0})
    longest = max(len(prompt.ids) for prompt in prompts)
    with Ranks() as ranks:
        learner = Learner(base, tokenizer, untrained, longest_prompt=longest, ranks=ranks, notice=_say)
        learner.deliver(version=0)
        with closing(draw(learner.engine, prompts, samples, config.sampling_params, config.seed, "test")) as groups:
            drawn = dict(groups)
    completions = [completion for group in drawn.values() for completion in group]
    if cut := sum(completion.finish_reason == "length" for completion in completions):
        notes.append(
            f"{cut} of {len(completions)} completions were cut off at {config.sampling_params.max_tokens} tokens."
        )
    return [(prompt.row, [c.text for c in drawn[place]]) for place, prompt in enumerate(prompts)]
