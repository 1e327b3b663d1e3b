"""Native kernels against their twins in torch, and what happens where they cannot be compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rewardsmith.rollout.fast import compiler, native
from rewardsmith.rollout.fast.attention import Rotary, Rows, Tables
from rewardsmith.rollout.fast.cache import PAGE, Cache, pages_for
from rewardsmith.rollout.fast.kernels import TorchKernels, choose
from rewardsmith.rollout.fast.native import NativeKernels, NativeOps
from rewardsmith.rollout.model.architecture import Architecture, LayerKind, Rope
from rewardsmith.rollout.model.layers import PlainOps
from rewardsmith.rollout.sampling import uniforms


def shape(
    heads: int = 6,
    kv_heads: int = 2,
    dim: int = 32,
    rotary: int | None = None,
    windows: tuple[int | None, ...] = (None,),
    softcap: float | None = None,
) -> Architecture:
    inv_freq_F = 100.0 ** -torch.linspace(0, 1, rotary or dim // 2)
    return Architecture(
        family="any",
        hidden=heads * dim,
        intermediate=8,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        layers=tuple(LayerKind(Rope(inv_freq_F, 1.3), window) for window in windows),
        norm_epsilon=1e-6,
        norm_offset=0.0,
        gate="silu",
        attention_scale=0.7 * dim**-0.5,
        attention_softcap=softcap,
        logit_softcap=None,
        embed_scale=1.0,
        context=None,
    )


class Scene:
    """A cache full of numbers (no numbers in what was never written), and rows of three prompts in it."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        generator = torch.Generator().manual_seed(0)
        prompts, lengths = [5, 32, 1], [[3, 17, 1, 16], [1, 40], [33, 20, 2, 2, 9]]
        counts = [len(group) for group in lengths]
        longest = max(max(group) for group in lengths)
        self.positions = max(prompts) + longest
        self.cache = Cache(architecture, torch.zeros(1))
        rows, own_pages, prompt_pages = sum(counts), pages_for(longest), pages_for(max(prompts))
        self.cache.grow(rows * own_pages + 3 * prompt_pages)
        order = torch.randperm(self.cache.pages, generator=generator)
        self.tables = Tables(
            order[: rows * own_pages].view(rows, -1),
            order[rows * own_pages :].view(3, -1),
            torch.tensor(prompts),
        )
        self.cache.keys.fill_(torch.nan), self.cache.values.fill_(torch.nan)
        slot_N = torch.randperm(rows, generator=generator)
        length_N = torch.tensor([length for group in lengths for length in group])
        group_N = torch.arange(3).repeat_interleave(torch.tensor(counts))
        for pages, tokens in [
            *zip(self.tables.own_pages_SM[slot_N], (length_N - 1).tolist(), strict=True),
            *zip(self.tables.prompt_pages_GM, prompts, strict=True),
        ]:
            for token in range(tokens):
                page, place = pages[token // PAGE], token % PAGE
                for to in (self.cache.keys[:, page, :, :, place], self.cache.values[:, page, :, place]):
                    to.copy_(torch.randn(to.shape, generator=generator) * 2)
        nothing_N = torch.zeros(rows, dtype=torch.long)
        self.rows = Rows(slot_N, group_N, length_N, nothing_N, nothing_N, nothing_N, torch.ones(rows))
        widths = [architecture.heads, architecture.kv_heads, architecture.kv_heads]
        fused = torch.randn(rows, sum(widths) * architecture.head_dim, generator=generator) * 2
        self.qkv = [
            part.unflatten(-1, (-1, architecture.head_dim))
            for part in fused.split([width * architecture.head_dim for width in widths], -1)
        ]

    def attend(
        self, kernels: TorchKernels | NativeKernels, dtype: torch.dtype = torch.float32
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """What each layer gives, and the keys and values in the cache afterwards."""
        like = torch.zeros(1, dtype=dtype)
        rotary, cache = Rotary(self.architecture, like), Cache(self.architecture, like)
        rotary.reserve(self.positions)
        cache.grow(self.cache.pages)
        cache.keys.copy_(self.cache.keys), cache.values.copy_(self.cache.values)
        qkv = [x.to(dtype) if dtype != x.dtype else x for x in self.qkv]
        layers = range(len(self.architecture.layers))
        outs = [kernels.attend(rotary, cache, self.tables, self.rows, i, *qkv) for i in layers]
        return outs, cache.keys, cache.values[..., : self.architecture.head_dim]


SHAPES = {
    "grouped": shape(),
    "one head each": shape(heads=4, kv_heads=4, dim=16),
    "one for all": shape(heads=11, kv_heads=1, dim=64),
    "odd width": shape(heads=4, kv_heads=2, dim=20),
    "narrow": shape(heads=4, kv_heads=2, dim=8),
    "partial rotary": shape(dim=24, rotary=5),
    "windows": shape(windows=(1, 2, 16, 17, 30, None, 1000)),
    "softcap": shape(softcap=1.5, windows=(None, 20)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_attention_is_that_of_its_twin(name: str, monkeypatch: pytest.MonkeyPatch):
    scene = Scene(SHAPES[name])
    twin = TorchKernels(scene.architecture)
    exact, _, _ = scene.attend(twin, torch.float64)
    rounded, keys, values = scene.attend(twin)
    for scratch in (2**16, 1):  # all rows of a prompt at once, one at a time
        monkeypatch.setattr(native, "_SCRATCH", scratch)
        got, native_keys, native_values = scene.attend(NativeKernels(scene.architecture))
        for ours, theirs, true in zip(got, rounded, exact, strict=True):
            assert (ours - true).abs().max() < 1e-6 + 2 * (theirs - true).abs().max()
            torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(native_keys, keys, rtol=1e-6, atol=1e-6, equal_nan=True)
        assert torch.equal(native_values.nan_to_num(), values.nan_to_num())


def test_threads_share_the_rows():
    scene = Scene(SHAPES["windows"])
    alone, *cached = scene.attend(NativeKernels(scene.architecture))
    torch.set_num_threads(3)
    try:
        shared, *also_cached = scene.attend(NativeKernels(scene.architecture))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(shared, alone, strict=True))
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(also_cached, cached, strict=True))


@pytest.mark.parametrize("name", SHAPES)
def test_the_twin_is_attention_by_its_definition(name: str):
    architecture = SHAPES[name]
    scene = Scene(architecture)
    outs, keys, values = scene.attend(TorchKernels(architecture), torch.float64)
    rotary = Rotary(architecture, torch.zeros(1, dtype=torch.float64))
    rotary.reserve(scene.positions)
    q_NHD = scene.qkv[0].double()
    rows, tables = scene.rows, scene.tables
    for layer, out_NHD in enumerate(outs):
        window = architecture.layers[layer].window
        for n in range(len(rows)):
            prompt = int(tables.prompt_length_G[rows.group_N[n]])
            total = prompt + int(rows.length_N[n])
            pages = [
                tables.prompt_pages_GM[rows.group_N[n], t // PAGE] if t < prompt
                else tables.own_pages_SM[rows.slot_N[n], (t - prompt) // PAGE]
                for t in range(total)
            ]  # fmt: skip
            places = [t % PAGE if t < prompt else (t - prompt) % PAGE for t in range(total)]
            seen = range(max(0, total - window) if window else 0, total)
            for head in range(architecture.heads):
                kv = head // (architecture.heads // architecture.kv_heads)
                q = rotary.rotate(layer, q_NHD[n, head][None, None], torch.tensor([total - 1]))[0, 0]
                scores = torch.stack([q @ keys[layer, pages[t], kv, :, places[t]] for t in seen])
                scores *= architecture.attention_scale
                if architecture.attention_softcap:
                    scores = architecture.attention_softcap * (scores / architecture.attention_softcap).tanh()
                weights = scores.softmax(0)
                mixed = sum(w * values[layer, pages[t], kv, places[t]] for w, t in zip(weights, seen, strict=True))
                assert (out_NHD[n, head] - mixed).abs().max() < 1e-12


@pytest.mark.parametrize("width", [1, 7, 16, 40, 192])
def test_token_wise_operations_are_those_of_their_twins(width: int):
    generator = torch.Generator().manual_seed(width)
    ours, plain = NativeOps(), PlainOps()
    x, more = (torch.randn(9, width, generator=generator) * 3 for _ in "ab")
    weight = torch.randn(width, generator=generator)
    close = {"rtol": 2e-6, "atol": 1e-6}
    torch.testing.assert_close(ours.norm(x, weight, 1e-5), plain.norm(x, weight, 1e-5), **close)
    fused = torch.randn(9, 5 * width, generator=generator)
    heads = fused[:, width : 4 * width].unflatten(1, (3, width))  # as q and k stand in a fused projection
    torch.testing.assert_close(ours.norm(heads, weight, 1e-5), plain.norm(heads, weight, 1e-5), **close)
    total, normed = plain.add_norm(x, more, weight, 1e-5)
    got_total, got_normed = ours.add_norm(x.clone(), more, weight, 1e-5)
    torch.testing.assert_close(got_total, total, rtol=0, atol=0)
    torch.testing.assert_close(got_normed, normed, **close)
    gate_up = torch.randn(9, 2 * width, generator=generator) * 30
    gate_up[0, 0], gate_up[1, 0], gate_up[2, 0] = 200.0, -200.0, 0.0
    for kind in ("silu", "gelu_tanh"):
        # In float64: torch's own tanh form loses digits in float32 where it is nearly zero.
        expected = plain.gate(gate_up.double(), kind)
        torch.testing.assert_close(ours.gate(gate_up, kind).double(), expected, **close)
        assert ours.gate(torch.full((1, 2 * width), torch.nan), kind).isnan().all()


@pytest.mark.parametrize("vocab", [1, 29, 64, 65, 1000])
def test_sampling_is_that_of_its_twin(vocab: int):
    rows = 3000
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(rows, vocab + 3, generator=generator) * 4)[:, :vocab]
    seeds = torch.randint(-(2**62), 2**62, (rows,), generator=generator)
    positions = torch.randint(0, 5000, (rows,), generator=generator)
    zero = torch.zeros(rows, dtype=torch.long)
    temperature = torch.rand(rows, generator=generator) * 2 + 0.1
    state = Rows(zero, zero, positions, zero, zero, seeds, temperature)
    ids, logps = NativeKernels(shape()).sample(logits, state)
    twin_ids, twin_logps = TorchKernels(shape()).sample(logits, state)
    all_logps = (logits.double() / temperature.double()[:, None]).log_softmax(-1)
    # Where a number falls on the border of two ids, rounding decides: a few of three thousand at most.
    assert (ids != twin_ids).sum() <= 3
    for drawn, logp in ((ids, logps), (twin_ids, twin_logps)):
        expected = all_logps.gather(1, drawn[:, None]).squeeze(1)
        assert ((logp - expected).abs() / (1 + expected.abs())).max() < 2e-6
    upto = all_logps.exp().cumsum(-1)
    u = uniforms(seeds, positions)
    after = upto.gather(1, ids[:, None]).squeeze(1)
    before = after - all_logps.exp().gather(1, ids[:, None]).squeeze(1)
    assert ((before - 1e-5 <= u) & (u <= after + 1e-5)).all()


def test_sampling_never_leaves_the_vocabulary():
    state = Rows(*(torch.zeros(4, dtype=torch.long),) * 6, torch.ones(4))
    logits = torch.full((4, 70), -torch.inf)
    logits[0, 69], logits[1, 0], logits[2] = 1.0, -1e30, torch.nan
    logits[3] = torch.inf
    ids, logps = NativeKernels(shape()).sample(logits, state)
    assert ids[0] == 69 and ids[1] == 0 and logps[:2].tolist() == [0.0, 0.0]
    assert ((ids >= 0) & (ids < 70)).all() and not logps[2:].isfinite().any()


# ---- compiling ----

CHOICE = (
    "import torch\n"
    "from test_kernels import shape\n"
    "from rewardsmith.rollout.fast.kernels import choose\n"
    "print(choose(shape(), torch.zeros(1)).name)\n"
)


def chosen(cache: Path, **environment: str) -> str:
    """The kernels that a new process uses."""
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    env = os.environ | {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": paths} | environment
    done = subprocess.run([sys.executable, "-c", CHOICE], env=env, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def script(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_without_a_compiler_the_engine_runs_in_torch_and_says_so(tmp_path: Path):
    assert chosen(tmp_path, PATH=str(tmp_path)) == "torch: no compiler"
    broken = script(
        tmp_path / "broken", "#!/bin/sh\n[ $1 = --version ] && exit 0\necho 'error: no headers' >&2\nexit 1\n"
    )
    assert chosen(tmp_path, CC=broken) == "torch: the compiler failed: error: no headers"
    assert choose(shape(), torch.zeros(1, dtype=torch.float64)).name == "torch: weights are float64 on cpu"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small C file, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "one.c"
    path.write_text("int number(void) { return 1; }\n")
    return path


def test_a_library_is_compiled_once_and_again_when_its_source_changes(source: Path, monkeypatch: pytest.MonkeyPatch):
    folder = source.parent / "cache" / "rewardsmith" / "kernels"
    assert compiler.load(source).number() == 1
    assert folder.stat().st_mode & 0o777 == 0o700
    (library,) = folder.iterdir()
    written = library.stat().st_mtime_ns
    assert compiler.load(source).number() == 1 and library.stat().st_mtime_ns == written
    source.write_text("int number(void) { return 2; }\n")
    assert compiler.load(source).number() == 2
    monkeypatch.setattr(compiler, "_processor", lambda: b"another one")
    compiler.load(source)
    assert len(list(folder.iterdir())) == 3  # nothing unfinished is left


@pytest.mark.parametrize("what", ["folder", "library"])
def test_what_others_can_write_to_is_not_loaded(source: Path, what: str):
    folder = source.parent / "cache" / "rewardsmith" / "kernels"
    compiler.load(source)
    (library,) = folder.iterdir()
    evil = source.parent / "evil.c"
    evil.write_text("int number(void) { return 666; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(evil)], check=True)
    (folder if what == "folder" else library).chmod(0o777)
    # A copy: the loader knows the other one by its name for as long as this process lives.
    copy = "import sys; from pathlib import Path; from rewardsmith.rollout.fast import compiler;"
    code = f"{copy} sys.exit(compiler.load(Path({str(source)!r})).number())"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 1


def test_a_link_in_place_of_the_library_is_replaced(source: Path):
    folder = source.parent / "cache" / "rewardsmith" / "kernels"
    compiler.load(source)
    (library,) = folder.iterdir()
    elsewhere = source.parent / "elsewhere.so"
    library.rename(elsewhere)
    library.symlink_to(elsewhere)
    assert compiler.load(source).number() == 1 and not library.is_symlink()
