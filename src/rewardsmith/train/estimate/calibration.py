"""How long the parts of a step take on this machine: the real engine and update, for a moment, on a shallow model.

The model has the widths and the vocabulary of the wanted one, random weights, and one or three of its layers; nothing
is downloaded. Every part of a step grows linearly with the layers, and with the tokens once sequences have the wanted
length, so two shallow models and two loads give all of it. What fits into memory is `estimate`'s business.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from math import log
from statistics import median
from typing import Any, cast

import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from rewardsmith.config import GRPOConfig
from rewardsmith.train.batch import Example
from rewardsmith.train.learner import Learner
from rewardsmith.train.parallel.ranks import Ranks

LAYERS = (1, 3)
REPEATS = 2  # the faster one counts: other work on the machine only ever adds
FLOPS = {"cpu": 1.5e10, "cuda": 2e12}  # of one measurement on one core or GPU: a fraction of a second
FEWEST_TOKENS = 8
DECODED = (6, 48)  # tokens to draw: fewer tell too little, more tell nothing new
Clock = Callable[[], float]


@dataclass(frozen=True)
class Load:
    """What a step computes on: groups of completions, lengths in tokens. `completion_tokens` is the mean one."""

    prompts: int
    group: int
    prompt_tokens: int
    completion_tokens: int
    longest: int

    @property
    def completions(self) -> int:
        return self.prompts * self.group

    @property
    def packed_tokens(self) -> int:
        """Every prompt once, all completions."""
        return self.prompts * (self.prompt_tokens + self.group * self.completion_tokens)

    def within(self, tokens: float, ranks: int) -> Load:
        """The same with fewer groups, then fewer completions, then shorter ones, so that it has about `tokens`.

        All ranks have work, also in half of it.
        """
        fewest = 2 * ranks
        prompts = min(self.prompts, int(tokens / (self.prompt_tokens + self.group * self.completion_tokens)))
        if prompts * self.group >= fewest:
            return replace(self, prompts=prompts)
        fitting = min(self.group, int((tokens - self.prompt_tokens) / self.completion_tokens))
        if fitting >= fewest:
            return replace(self, prompts=1, group=fitting // fewest * fewest)
        each = max(FEWEST_TOKENS, int(tokens / (1 + fewest)))
        short = min(self.completion_tokens, each)
        return Load(1, fewest, min(self.prompt_tokens, each), short, short)

    def halved(self) -> Load:
        """Of a load that is `within` some tokens."""
        if self.prompts > 1:
            return replace(self, prompts=self.prompts // 2)
        return replace(self, group=self.group // 2)

    def drawing_steps(self, at_a_time: float) -> float:
        """How often a next token is drawn for what runs at a time, one finished completion making room for another.

        Where lengths differ they are taken as geometric. At the end the batch empties: the longest of n completions
        has about ln n + 0.58 times the mean (the n-th harmonic number), and at most `longest` tokens.
        """
        full = max(0.0, self.completions - at_a_time) * self.completion_tokens / at_a_time
        if self.completion_tokens >= self.longest:
            return full + self.longest
        return full + min(self.longest, self.completion_tokens * (log(max(at_a_time, 1)) + 0.58))


@dataclass(frozen=True)
class Parts:
    """Seconds of one model: of reading a prompt's token, of drawing next tokens by itself and per completion that gets
    one, of a whole update, of a delivery."""

    prompt_token: float
    next: float
    next_token: float
    update: float
    deliver: float

    def at(self, layers: int, shallow: Parts, depth: int, shallow_depth: int) -> Parts:
        """Of a model with `layers` layers; this is the one with `depth` of them."""
        if depth == shallow_depth:
            return self

        def line(name: str) -> float:
            low, high = getattr(shallow, name), getattr(self, name)
            # Noise may make the deeper model the faster one; no layer takes less than nothing.
            per_layer = max(0.0, high - low) / (depth - shallow_depth)
            return float(high + per_layer * (layers - depth))

        return Parts(*(line(name) for name in Parts.__dataclass_fields__))


@dataclass(frozen=True)
class Measured:
    """`path` and `notices` as the learner gives them; `at_a_time` completions are drawn at once, by all ranks."""

    parts: Parts
    path: str
    notices: list[str]
    ranks: int
    at_a_time: int

    @property
    def fast(self) -> bool:
        return self.path.startswith("fast")

    def seconds(self, load: Load) -> dict[str, float]:
        """Of a step by phase, on the load that was measured for, all completions with a signal."""
        parts = self.parts
        reading = load.prompts * load.prompt_tokens * parts.prompt_token
        share = replace(load, prompts=1, group=max(1, load.completions // self.ranks))
        steps = share.drawing_steps(min(share.group, self.at_a_time / self.ranks))
        drawing = steps * parts.next + load.completions * load.completion_tokens * parts.next_token
        return {"generate": reading + drawing, "update": parts.update, "deliver": parts.deliver}


def measure(
    model_config: PretrainedConfig,
    config: GRPOConfig,
    load: Load,
    teams: Sequence[Ranks],
    *,
    slots: int,
    clock: Clock = time.perf_counter,
) -> Measured:
    """`teams` are as many ranks as a job would have, once for each of LAYERS; `slots` is how many completions one rank
    draws at a time on the fast path. Raises ModelError."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = model_config.get_text_config(decoder=True).num_hidden_layers
    depths = sorted({min(depth, wanted) for depth in LAYERS})
    found: list[Parts] = []
    for depth, ranks in zip(depths, teams, strict=False):
        trial = Trial(shallow_model(model_config, depth, device), config, load.prompt_tokens, ranks, clock)
        path, count = trial.learner.path, ranks.count
        at_a_time = min(load.completions, slots * count) if path.startswith("fast") else load.completions
        found.append(trial.parts(load, at_a_time, device))
        ranks.close()
    parts = found[-1].at(wanted, found[0], depths[-1], depths[0])
    return Measured(parts, path, trial.notices, count, at_a_time)


class Trial:
    """A shallow model in training."""

    def __init__(
        self, model: PreTrainedModel, config: GRPOConfig, prompt_tokens: int, ranks: Ranks, clock: Clock
    ) -> None:
        self._clock = clock
        self._config = config
        self._linear, self._head = _sizes(model)
        self._ranks = ranks.count
        self._vocab = model.config.get_text_config(decoder=True).vocab_size
        self._drawn: list[float] = []  # when each token came
        self.notices: list[str] = []
        self.learner = Learner(
            model,
            endless_tokenizer(self._vocab),
            config,
            longest_prompt=prompt_tokens,
            ranks=ranks,
            between_tokens=lambda: self._drawn.append(self._now()),
            notice=self.notices.append,
        )
        self._device = model.device
        self._version = 0

    def parts(self, load: Load, at_a_time: int, device: torch.device) -> Parts:
        flops = FLOPS[device.type] * (self._ranks if self._ranks > 1 else torch.get_num_threads())
        deliver = self._least(self._deliver)
        reading, step, token = self._generation(load, at_a_time, flops)
        large = load.within(flops / (4 * self._linear + 6 * self._head), self._ranks)
        small = large.halved()
        self._update(small)
        seconds, fewer = self._least(lambda: self._update(large)), self._least(lambda: self._update(small))
        per_work = max(0.0, seconds - fewer) / max(1, self._work(large) - self._work(small))
        update = seconds + per_work * (self._work(load) - self._work(large))
        return Parts(reading, step, token, update, deliver)

    def _work(self, load: Load) -> int:
        """Operations of an update, about. The head is for completions only, and computed once more."""
        prompts = load.prompts if self.learner.path.startswith("fast") else load.completions
        completions = load.completions * load.completion_tokens
        # Forward and backward, the latter without gradients of base weights.
        return 4 * self._linear * (prompts * load.prompt_tokens + completions) + 6 * self._head * completions

    def _generation(self, load: Load, at_a_time: int, flops: float) -> tuple[float, float, float]:
        """Seconds per token of a prompt; of one more token for all that is drawn, by itself and per completion."""
        forward = 2 * (self._linear + self._head)
        tokens = min(max(int(flops / (at_a_time * forward)), DECODED[0]), DECODED[1], load.completion_tokens)
        prompts = min(load.prompts, -(-at_a_time // load.group))
        # As long as a completion and its prompt are on average, since attention grows with it.
        context = load.prompt_tokens + max(0, load.completion_tokens - tokens) // 2
        length = max(FEWEST_TOKENS, min(context, int(flops / (prompts * 2 * self._linear))))
        many = Load(prompts, -(-at_a_time // prompts), length, tokens, tokens)
        few = replace(many, prompts=1, group=max(self._ranks, at_a_time // 8))
        self._draw(few)
        runs = [self._draw(many) for _ in range(REPEATS)]
        step = min(step for _, step in runs)
        reading = max(0.0, min(total for total, _ in runs) - tokens * step) / (prompts * length)
        if many.completions <= few.completions:
            return reading, step, 0.0
        less = min(step for _, step in (self._draw(few) for _ in range(REPEATS)))
        token = max(0.0, step - less) / (many.completions - few.completions)
        return reading, max(0.0, step - token * many.completions), token

    def _draw(self, load: Load) -> tuple[float, float]:
        """Seconds of it all, and of one more token."""
        prompts = [self._ids(load.prompt_tokens, i) for i in range(load.prompts)]
        params = self._config.sampling_params.model_copy(update={"max_tokens": load.completion_tokens, "stop": []})
        self._drawn.clear()
        started = self._now()
        for _ in self.learner.engine.generate(prompts, load.group, params, range(load.completions)):
            pass
        total = self._now() - started
        steps = [later - sooner for sooner, later in zip(self._drawn, self._drawn[1:], strict=False)]
        # The first ones read prompts too, the last ones may wait for another rank.
        return total, median(steps[len(steps) // 4 : load.completion_tokens] or [total / load.completion_tokens])

    def _examples(self, load: Load) -> list[Example]:
        """All with a signal, as if `shallow_model` had drawn them."""
        logps = [-log(self._vocab)] * load.completion_tokens
        weight = 1 / (load.completions * load.completion_tokens)
        return [
            Example(self._ids(load.prompt_tokens, i), self._ids(load.completion_tokens, n), (-1.0) ** n, weight, logps)
            for i in range(load.prompts)
            for n in range(load.group)
        ]

    def _update(self, load: Load) -> float:
        examples = self._examples(load)
        started = self._now()
        if self._config.kl_in == "reward":
            self.learner.reference_logps(examples)
        self.learner.update(examples, 1, 2)
        return self._now() - started

    def _deliver(self) -> float:
        self._version += 1
        started = self._now()
        self.learner.deliver(self._version)
        return self._now() - started

    def _least(self, run: Callable[[], float]) -> float:
        return min(run() for _ in range(REPEATS))

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self._clock()

    def _ids(self, length: int, seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        ids: list[int] = torch.randint(self._vocab, (length,), generator=generator).tolist()
        return ids


def shallow(model_config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same model with fewer layers: lists with an entry for each layer are cut too."""
    config = deepcopy(model_config)
    text: Any = config.get_text_config(decoder=True)
    before = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == before:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return config


@torch.no_grad()
def shallow_model(model_config: PretrainedConfig, layers: int, device: torch.device) -> PreTrainedModel:
    """In the precision that jobs use. It never ends a completion by itself.

    Its weights are random, but for a head of zeros: all tokens are equally likely, so the log-probs that the update
    compares with are known without a draw.
    """
    config = shallow(model_config, layers)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    for parameter in _head(model).parameters():
        parameter.zero_()
    model.generation_config.eos_token_id = None
    model.requires_grad_(False)
    model.train(False)
    return model


def endless_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """A word for each id, and none that ends a turn."""
    words = {f"t{i}": i for i in range(vocab)}
    inner = Tokenizer(models.WordLevel(words, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=inner)  # type: ignore[no-untyped-call]


def _head(model: PreTrainedModel) -> torch.nn.Module:
    head: torch.nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head


def _sizes(model: PreTrainedModel) -> tuple[int, int]:
    """Numbers in the linear layers without the head, and in the head."""
    tables: dict[int, int] = {}
    for module in (model.get_input_embeddings(), _head(model)):
        weight = cast(torch.Tensor, module.weight)
        tables[id(weight)] = weight.numel()
    all_linear = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
    return all_linear - sum(tables.values()), weight.numel()
