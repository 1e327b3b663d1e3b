"""Whether a model and a config fit this machine, and about how long a step takes: said before the start.

Memory is arithmetic (`footprint`), time is measured on a shallow model (`calibration`). Of the model, only its config
is read. What a running job shows of itself is the business of `forecast`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from transformers import AutoConfig, PretrainedConfig

from rewardsmith import machine
from rewardsmith.config import GRPOConfig
from rewardsmith.errors import ModelError
from rewardsmith.quantities import size
from rewardsmith.rollout.fast.engine import SLOTS
from rewardsmith.rollout.memory import free_bytes
from rewardsmith.train.estimate.calibration import LAYERS, Clock, Load, Measured, measure
from rewardsmith.train.estimate.footprint import Memory, Shape, lay_out, need
from rewardsmith.train.forecast import peak_bytes
from rewardsmith.train.parallel.ranks import SMALL_MODEL_BYTES, Ranks

DEFAULT_PROMPT_TOKENS = 256
SHORTEST = 16  # tokens of a completion that is worth advising
MemoryOf = Callable[[Load, Shape], Memory]


@dataclass(frozen=True)
class Estimate:
    """`seconds` of a step by phase, without the user's reward functions; None where nothing could be measured, then
    `unmeasured` says why. `path` says what runs, `notices` what a job would say of it at its start. `advice` is what
    would make it fit, or faster."""

    model: str
    shape: Shape
    load: Load
    device: str
    ranks: int
    threads: int
    path: str
    notices: list[str]
    memory: Memory
    seconds: Mapping[str, float] | None
    unmeasured: str
    total_steps: int | None
    advice: list[str]

    @property
    def per_step(self) -> float | None:
        return None if self.seconds is None else sum(self.seconds.values())

    @property
    def total(self) -> float | None:
        return None if self.per_step is None or self.total_steps is None else self.per_step * self.total_steps


def estimate(
    source: str,
    config: GRPOConfig,
    prompt_tokens: int = DEFAULT_PROMPT_TOKENS,
    completion_tokens: int | None = None,
    *,
    start: Callable[[], Ranks] = Ranks.of_this_machine,
    clock: Clock = time.perf_counter,
) -> Estimate:
    """Of a step on `source`, a folder or a Hugging Face id whose config is on this machine.

    `completion_tokens` is the mean length, by default `max_tokens`. `start` starts the ranks of a small model. Raises
    ModelError.
    """
    model_config = read_config(source)
    shape = lay_out(model_config, config)
    longest = _longest(config, shape, prompt_tokens)
    usual = min(completion_tokens or longest, longest)
    load = Load(config.prompts_per_step, config.num_generations, prompt_tokens, usual, longest)
    with ExitStack() as open_ranks:
        # All before the first model: ranks are forked from a process that has no threads yet.
        teams = [open_ranks.enter_context(start() if _is_small(shape) else Ranks()) for _ in LAYERS]
        return _estimate(source, model_config, config, shape, load, teams, clock)


def _estimate(
    source: str,
    model_config: PretrainedConfig,
    config: GRPOConfig,
    shape: Shape,
    load: Load,
    teams: Sequence[Ranks],
    clock: Clock,
) -> Estimate:
    on_gpu, ranks = torch.cuda.is_available(), teams[0].count
    device = torch.device("cuda" if on_gpu else "cpu")
    own = 0 if on_gpu else peak_bytes() or 0
    available = free_bytes(device) + own
    # Only the shallow model tells whether the fast path runs a model; dropout alone rules it out.
    fast = not config.lora_dropout

    def memory_of(load: Load, shape: Shape) -> Memory:
        return need(shape, load, device=device, ranks=ranks, own=own, available=available, fast=fast)

    measured, unmeasured = None, ""
    few = shape.with_layers(min(max(LAYERS), shape.layers))
    trial = memory_of(replace(load, prompts=1, longest=1), few).peak
    if not memory_of(load, shape).fits:
        unmeasured = "it does not fit"
    elif 2 * trial > available:
        unmeasured = f"a model of {few.layers} layers, which is timed in its place, would already take {size(trial)}"
    else:
        measured = measure(model_config, config, load, teams, slots=SLOTS[device.type], clock=clock)
        fast, ranks = measured.fast, measured.ranks
    return Estimate(
        model=source,
        shape=shape,
        load=load,
        device=torch.cuda.get_device_name() if on_gpu else "cpu",
        ranks=ranks,
        threads=1 if ranks > 1 else machine.threads(),
        # The number of layers that it ends in is the shallow model's.
        path=measured.path.partition(", adapter")[0] if measured else "",
        notices=measured.notices if measured else [],
        memory=memory_of(load, shape),
        seconds=measured.seconds(load) if measured else None,
        unmeasured=unmeasured,
        total_steps=None if config.epochs and not config.train_steps else config.total_steps(0),
        advice=_advice(config, measured, memory_of, load, shape),
    )


def read_config(source: str) -> PretrainedConfig:
    """From this machine only. Raises ModelError when it is not here or not of a language model."""
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"the config of base model {source!r} is not on this machine, and an estimate downloads nothing. Fetch it "
            f"once (`hf download {source} config.json`), or name a folder that has its config.json. "
            f"({str(error).strip().splitlines()[0]})"
        ) from None
    return config


def _longest(config: GRPOConfig, shape: Shape, prompt_tokens: int) -> int:
    """Tokens that a completion may have. Raises ModelError when the prompt leaves room for none."""
    room = config.sampling_params.max_tokens if shape.context is None else shape.context - prompt_tokens
    if room < 1:
        raise ModelError(f"a prompt of {prompt_tokens} tokens fills the model's context of {shape.context}")
    return min(room, config.sampling_params.max_tokens)


def _is_small(shape: Shape) -> bool:
    """Whether `Ranks.load` lets a model have several ranks; on GPUs each has a card of its own."""
    return torch.cuda.is_available() or 4 * (shape.linear + shape.vocab * shape.hidden) <= SMALL_MODEL_BYTES


def _advice(config: GRPOConfig, measured: Measured | None, memory_of: MemoryOf, load: Load, shape: Shape) -> list[str]:
    """What would make it fit; what makes it slow and need not."""
    if memory_of(load, shape).fits:
        dropped_out = measured is not None and not measured.fast and config.lora_dropout
        return ["lora_dropout=0 takes the fast path, which is several times faster"] if dropped_out else []
    smaller = [
        next((text for text, lighter, leaner in halved if memory_of(lighter, leaner).fits), None)
        for halved in (_shorter(load, shape), _fewer(load, shape), _lower_rank(load, shape, config.rank))
    ]
    if enough := [text for text in smaller if text]:
        return enough
    least = memory_of(replace(load, prompts=1, group=2, longest=1), shape)
    by_weights = least.parts["model"] + least.parts["merged copy"]
    largest = max(0.0, (least.available - (least.peak - by_weights)) * shape.weights / by_weights)
    return [
        f"no setting makes it fit: a base model of up to about {largest / 1e9:.2g} billion parameters does, or a "
        f"machine with {size(least.peak)} free"
    ]


def _shorter(load: Load, shape: Shape) -> Iterator[tuple[str, Load, Shape]]:
    tokens = load.longest
    while (tokens := tokens // 2) >= SHORTEST:
        yield f"sampling_params.max_tokens={tokens}", replace(load, longest=tokens), shape


def _fewer(load: Load, shape: Shape) -> Iterator[tuple[str, Load, Shape]]:
    group = load.group
    while (group := group // 2) >= 2:
        words = f"num_generations={group} with effective_batch_size={group * load.prompts}"
        yield words, replace(load, group=group), shape


def _lower_rank(load: Load, shape: Shape, rank: int) -> Iterator[tuple[str, Load, Shape]]:
    lower = rank
    while (lower := lower // 2) >= 1:
        yield f"rank={lower}", load, replace(shape, adapter=shape.adapter * lower // rank)
