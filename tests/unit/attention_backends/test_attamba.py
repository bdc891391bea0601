"""Attamba without an engine: closed forms, the scan, attention over pages that the tests keep, sizes, weights."""

import json
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from starling.attention_backends.attamba import attend_step as attention
from starling.attention_backends.attamba import mix
from starling.attention_backends.attamba.attamba_backend import AttambaMetadataBuilder
from starling.attention_backends.attamba.attend_step import Cache, Sizes
from starling.attention_backends.attamba.cache import KvPages, cache_specs
from starling.attention_backends.attamba.chunks import (
    PAGE_ROWS,
    ChunkPlan,
    StepTokens,
    chunk_start,
    dense_tokens,
    layer_offset,
    plan_step,
    prompt_keys,
)
from starling.attention_backends.attamba.mixer import MixerParameters, MixerSizes
from starling.attention_backends.kernels.cpu.paged_op import built_op
from starling.attention_backends.star.step import StarStep, open_step
from starling.engine_ext.models.attamba import MIXERS, load_checkpoint, refuse_features, target_shard
from starling.engine_ext.models.configs import AttambaConfig
from starling.scheduler.planning.plan import StarPlan
from tests.references import attamba as reference
from tests.unit.attention_backends.test_rows import batch_metadata

HEADS, SIZE = 2, 16
DIM = HEADS * SIZE
CHUNK_SIZES, WINDOWS = [2, 3, 4, 8, 64], [1, 5, 16, 128]


def chunk_ends(num_tokens: int, chunk_size: int, offset: int) -> torch.Tensor:
    """(num_tokens,) bool, whether each token ends a chunk, by the definition."""
    return torch.tensor([token == 0 or (token + 1 + offset) % chunk_size == 0 for token in range(num_tokens)])


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("layers", [1, 3, 8])
def test_offsets_and_starts(chunk_size, layers):
    for layer in range(layers):
        offset = layer_offset(layer, layers, chunk_size)
        assert offset == min(chunk_size - 1, layer * (chunk_size // layers))
        ends, start = chunk_ends(200, chunk_size, offset), 0
        for position in range(200):
            assert chunk_start(np.array([position]), chunk_size, offset)[0] == start
            start = position + 1 if ends[position] else start


class Pages:
    """One cache of some requests. Pages are assigned in random order and hold NaN at first."""

    def __init__(self, spec, requests: int, num_tokens: int, random: np.random.Generator) -> None:
        self.spec = spec
        columns = -(-num_tokens // spec.block_size)
        order = random.permutation(requests * columns) + 1
        self.table = torch.from_numpy(order.reshape(requests, columns).astype(np.int32))
        self.pages = torch.full((requests * columns + 1, PAGE_ROWS + 1, 2 * DIM), float("nan"))

    def free(self, request: int, before: int) -> None:
        """Free the pages that lie wholly before a position, as a sliding window does: their columns become page 0."""
        self.table[request, : max(0, before) // self.spec.block_size] = 0


LAYERS = 3


@st.composite
def requests(draw):
    """(P, L, layer, [(length, star plan or None) of each request]); star blocks and anchors are whole pages."""
    chunk_size, window = draw(st.sampled_from(CHUNK_SIZES)), draw(st.sampled_from(WINDOWS))
    page_size, batch = PAGE_ROWS * chunk_size, []
    for _ in range(draw(st.integers(1, 3))):
        length = draw(st.integers(1, 300 if chunk_size < 64 else 2500))
        block_size, context_end = page_size * draw(st.integers(1, 3)), draw(st.integers(0, length - 1))
        anchor_size = page_size * draw(st.integers(0, block_size // page_size))
        plan = StarPlan(block_size, anchor_size, 0, context_end, length)
        batch.append((length, draw(st.sampled_from([None, plan, plan]))))
    return chunk_size, window, draw(st.integers(0, LAYERS - 1)), batch


def mask_of(length: int, plan: StarPlan | None, ends: torch.Tensor, window: int) -> torch.Tensor:
    """The reference's mask."""
    if plan is None:
        return reference.attention_mask(length, ends, window)
    sizes = {"block_size": plan.block_size, "anchor_size": plan.anchor_size, "context_end": plan.context_end}
    return reference.star_mask(length, ends, window, **sizes)


def rotated(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """(T, heads, size) of x (T, dim): each pair as a complex number, multiplied by that of its angle (T, size / 2)."""
    pairs = torch.view_as_complex(x.reshape(len(x), HEADS, -1, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)


def make_builder(spec, chunk_size: int, window: int) -> AttambaMetadataBuilder:
    config = SimpleNamespace(token_chunk=chunk_size, leading_tokens=window, num_hidden_layers=LAYERS)
    vllm_config = SimpleNamespace(model_config=SimpleNamespace(hf_config=config))
    return AttambaMetadataBuilder(spec, ["layer"], vllm_config, torch.device("cpu"))


@pytest.mark.parametrize("attend", ["attend", "attend_in_torch"])
@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(drawn=requests(), seed=st.integers(0, 99))
def test_attention_over_pages_is_that_of_the_mask(attend, drawn, seed):
    """Attention over pages equals attention with the reference's mask, and star steps count the mask's pairs.

    Steps cut the requests anywhere, batches mix dense and star requests, and pages before the window are freed.
    """
    run = getattr(attention, attend)
    chunk_size, window, layer, batch = drawn
    lengths, plans = [length for length, _ in batch], [plan for _, plan in batch]
    random, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    offset = layer_offset(layer, LAYERS, chunk_size)
    specs = cache_specs(chunk_size, window, DIM, DIM, torch.float32)
    states, recent = (Pages(specs[name], len(lengths), max(lengths), random) for name in ("states", "window"))
    builders = [make_builder(cache.spec, chunk_size, window) for cache in (states, recent)]
    states_kv, recent_kv = (KvPages(cache.pages, HEADS) for cache in (states, recent))
    query, key, value, own = ([torch.randn(n, DIM, generator=generator) for n in lengths] for _ in range(4))
    angles = torch.rand(max(lengths), SIZE // 2, generator=generator) * 6
    turns = angles.cos(), angles.sin()
    done, got, counted = [0] * len(lengths), [[] for _ in lengths], []
    while any(at < length for at, length in zip(done, lengths, strict=True)):
        stop = 90 if chunk_size < 64 else 700
        lens = np.array([min(length - at, random.integers(1, stop)) for at, length in zip(done, lengths, strict=True)])
        active = np.flatnonzero(lens)
        lens, seq_lens = lens[active], np.array(done)[active] + lens[active]
        names = [str(request) for request in active]
        scheduled = dict(zip(names, lens.tolist(), strict=True))
        in_context = {str(r): plans[r] for r in active if plans[r] is not None and done[r] < plans[r].context_end}
        step = StarStep(in_context, scheduled, lambda names=names: names, counted.append) if in_context else None
        common = batch_metadata(lens.tolist(), seq_lens.tolist(), columns=1)
        with open_step(step):
            metadata = [
                builder.build(0, common.replace(block_table_tensor=cache.table[active]))
                for builder, cache in zip(builders, (states, recent), strict=True)
            ]
        plan = metadata[0].plan(chunk_size, offset, window)
        spans = [slice(done[request], done[request] + count) for request, count in zip(active, lens, strict=True)]
        q, k, v, x = (
            torch.cat([of[request][span] for request, span in zip(active, spans, strict=True)])
            for of in (query, key, value, own)
        )
        caches = Cache(states_kv, metadata[0]), Cache(recent_kv, metadata[1])
        out = run(q, (k, v), x, turns, *caches, plan, Sizes(chunk_size, window + 1, 0.5))
        for request, part in zip(active, out.split(lens.tolist()), strict=True):
            got[request].append(part)
            done[request] += len(part)
            recent.free(request, done[request] - window)
    for request, length in enumerate(lengths):
        mask = mask_of(length, plans[request], chunk_ends(length, chunk_size, offset), window)
        q, k = (rotated(part, angles[:length]) for part in (query[request], key[request] + own[request]))
        weights = (torch.einsum("qhd,khd->hqk", q, k) * 0.5).masked_fill(~mask, float("-inf")).softmax(-1)
        v = (value[request] + own[request]).unflatten(-1, (HEADS, SIZE))
        expected = torch.einsum("hqk,khd->qhd", weights, v).flatten(1)
        assert (torch.cat(got[request]) - expected).abs().max() < 1e-5

    expected_counts = np.zeros(3)
    for length, plan in batch:
        for each in range(LAYERS if plan is not None else 0):
            ends = chunk_ends(length, chunk_size, layer_offset(each, LAYERS, chunk_size))
            pairs = [mask_of(length, which, ends, window)[: plan.context_end].sum() for which in (plan, None)]
            expected_counts += np.array([plan.context_end, *pairs]) / LAYERS
    sums = [sum(getattr(rows, name) for rows in counted) for name in ("context_tokens", "star_pairs", "dense_pairs")]
    assert sums == pytest.approx(expected_counts)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(drawn=requests())
def test_prompt_keys_are_those_of_the_mask(drawn):
    chunk_size, window, _, batch = drawn
    length, plan = batch[0]
    got = prompt_keys(plan, length, chunk_size, window, LAYERS)
    ends = [chunk_ends(length, chunk_size, layer_offset(layer, LAYERS, chunk_size)) for layer in range(LAYERS)]
    context_end = length if plan is None else plan.context_end
    stars, denses = ([mask_of(length, of, each, window).sum(1) for each in ends] for of in (plan, None))
    contexts = [keys[:context_end] for keys in stars]
    star, dense, context = (sum(int(keys.sum()) for keys in each) / LAYERS for each in (stars, denses, contexts))
    assert got == {
        "keys_attended": pytest.approx(star, abs=0.5),
        "dense_keys": pytest.approx(dense, abs=0.5),
        "keys_per_context_token": pytest.approx(context / max(1, context_end), abs=0.05001),
    }


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(drawn=requests(), random=st.randoms(use_true_random=False))
def test_the_plans_of_both_languages_are_equal(drawn, random):
    """For dense tokens and for star pieces that begin and end anywhere."""
    chunk_size, window, layer, batch = drawn
    columns = []
    for request, (length, plan) in enumerate(batch):
        stop = random.randint(1, length)
        for position in range(random.randrange(stop), stop):
            block = 0 if plan is None or position >= plan.context_end else position // plan.block_size
            start = block * (plan.block_size if plan else 0)
            columns.append((request, position, 7 * request + block, start, plan.anchor_size if block else 0))
    tokens = StepTokens(*np.array(columns).T)
    args = chunk_size, layer_offset(layer, LAYERS, chunk_size), window
    names = [field.name for field in fields(ChunkPlan) if field.init]
    for name, array in zip(names, built_op().attamba_plan(*tokens.tensors, *args), strict=True):
        want = getattr(plan_step(tokens, *args), name)
        assert (array.dtype, array.tolist()) == (want.dtype, want.tolist()), name


@pytest.mark.parametrize("mixed_by", [mix.mix, mix.mix_in_torch], ids=["mix", "torch"])
@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize(
    ("layer", "sizes"), [(0, (2, 32, 16, 4)), (1, (3, 39, 7, 2)), (2, (20, 40, 24, 3)), (1, (2, 32, 16, 6))]
)
def test_mixers_are_the_recurrence(mixed_by, chunk_size, layer, sizes, monkeypatch):
    """Steps that begin at the first token, within a chunk, and of one token; in groups of few chunks."""
    monkeypatch.setattr(mix, "GROUP_ROWS", 3 * chunk_size)
    torch.manual_seed(0)
    sizes, offset, num_tokens = MixerSizes(*sizes), layer_offset(layer, 3, chunk_size), 100
    config = {"ssm_heads": sizes.heads, "ssm_inner": sizes.inner, "ssm_state_dim": sizes.state, "rms_norm_eps": 1e-5}
    config["conv_size"] = sizes.taps
    weights = {
        f"{name}.{part}": tensor
        for name in MIXERS
        for part, tensor in (
            ("in_proj.weight", torch.randn(sizes.inner + sizes.width, DIM, dtype=torch.float64) * 0.2),
            ("conv_weight", torch.randn(sizes.channels, sizes.taps, dtype=torch.float64)),
            ("A_log", torch.randn(sizes.heads, dtype=torch.float64)),
            ("D", torch.randn(sizes.heads, dtype=torch.float64)),
            ("ssm_norm.weight", torch.randn(sizes.inner, dtype=torch.float64)),
            ("out_proj.weight", torch.eye(sizes.inner, dtype=torch.float64)),
        )
    }

    def both(part: str) -> torch.Tensor:
        return torch.stack([weights[f"{name}.{part}"] for name in MIXERS])

    x, ends = torch.randn(num_tokens, DIM, dtype=torch.float64), chunk_ends(num_tokens, chunk_size, offset)
    expected = torch.stack([reference.mixer(x, weights, name, ends, config) for name in MIXERS])
    conv, a_log, skip, norm = (both(name).float() for name in ("conv_weight", "A_log", "D", "ssm_norm.weight"))
    parameters = MixerParameters(conv.transpose(1, 2).contiguous(), a_log, skip, norm)
    projected = torch.einsum("td,mcd->tmc", x, both("in_proj.weight")).float().flatten(1)
    pages = torch.full((9, 16, sizes.row), float("nan"))
    table = torch.randperm(8)[None].int() + 1
    first = 0
    for end in (37, 38, 64, 99, 100):
        plan = plan_step(dense_tokens(np.array([end - first]), np.array([end])), chunk_size, offset, 5)
        got = mixed_by(projected[first:end], pages, table, plan, parameters, sizes, 1e-5)
        assert (got - expected[:, first:end]).abs().max() < 1e-4
        first = end


@pytest.mark.parametrize("mixed_by", [mix.mix, mix.mix_in_torch], ids=["mix", "torch"])
@pytest.mark.parametrize("hit_first", [False, True])
def test_a_page_that_another_request_fills_in_the_same_step_can_be_read(mixed_by, hit_first):
    """vLLM's prefix cache also hits pages that are only scheduled to be written in the step."""
    sizes, chunk_size, offset, length = MixerSizes(2, 32, 16, 4), 4, 2, 65
    projected = torch.randn(length, sizes.count * (sizes.inner + sizes.width))
    shapes = (sizes.taps, sizes.channels), (sizes.heads,), (sizes.heads,), (sizes.inner,)
    parameters = MixerParameters(*(torch.randn(sizes.count, *shape) for shape in shapes))

    def run(parts: list[tuple[int, int]], table: list[list[int]]) -> torch.Tensor:
        """The mixers' outputs of the tokens [first, end) of each request."""
        lens, ends = np.array([end - first for first, end in parts]), np.array([end for _, end in parts])
        plan = plan_step(dense_tokens(lens, ends), chunk_size, offset, 5)
        pages = torch.full((9, 8, sizes.row), float("nan"))
        rows = torch.cat([projected[slice(*part)] for part in parts])
        return mixed_by(rows, pages, torch.tensor(table).int(), plan, parameters, sizes, 1e-5)

    page_ids = list(range(8))
    alone = run([(0, length)], [[*page_ids, 8]])
    fills, hits = (0, length - 1), (length - 1, length)
    got = run([hits, fills] if hit_first else [fills, hits], [[*page_ids, 8]] * 2)
    expected = torch.cat([alone[:, slice(*part)] for part in ([hits, fills] if hit_first else [fills, hits])], 1)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_pages_have_equal_bytes(ranks):
    specs = cache_specs(8, 16, 1040, 512 // ranks, torch.bfloat16)
    assert len({spec.page_size_bytes for spec in specs.values()}) == 1
    assert {name: spec.block_size for name, spec in specs.items()} == {"states": 128, "window": 16, "rows": 16 // ranks}


@pytest.mark.parametrize(
    ("chunk_size", "window", "local_dim", "message"),
    [
        (1, 16, 64, ["token_chunk=1", "2 to 128"]),
        (129, 16, 64, ["token_chunk=129", "2 to 128"]),
        (8, 0, 64, ["leading_tokens=0", "1 to 256"]),
        (8, 257, 64, ["leading_tokens=257", "1 to 256"]),
        (8, 16, 1, ["ssm_inner", "64 values", "at most 34"]),
    ],
)
def test_sizes_that_the_caches_do_not_support(chunk_size, window, local_dim, message):
    with pytest.raises(ValueError) as refused:
        cache_specs(chunk_size, window, 64, local_dim, torch.float32)
    assert all(part in str(refused.value) for part in message), refused.value


def test_config_survives_json_and_refuses_other_values():
    config = AttambaConfig(token_chunk=4, hidden_size=64, num_attention_heads=4)
    again = AttambaConfig(**json.loads(config.to_json_string(use_diff=False)))
    assert (again.token_chunk, again.head_dim, again.num_key_value_heads) == (4, 16, 4)
    for wrong in (
        {"num_key_value_heads": 1},
        {"tie_word_embeddings": True},
        {"ssm_inner": 60},
        {"hidden_size": 516},
    ):
        with pytest.raises(ValueError, match="is refused"):
            AttambaConfig(**wrong)


def test_config_has_the_page_size_of_the_states_and_the_dependence_of_star_blocks():
    config = AttambaConfig(token_chunk=4)
    assert config.page_tokens == cache_specs(4, 16, 1040, 512, torch.float32)["states"].block_size
    assert "straddles" in config.star_blocks_depend
    assert "star_blocks_depend" not in json.loads(config.to_json_string(use_diff=False))


PARALLEL = {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1, "use_ubatching": False}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache_config": {"cache_dtype": "fp8"}}, "kv_cache_dtype=fp8"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"quant_config": object()}, "quantization=awq"),
        ({"parallel_config": PARALLEL | {"decode_context_parallel_size": 2}}, "decode context"),
        ({"parallel_config": PARALLEL | {"prefill_context_parallel_size": 2}}, "prefill context"),
        ({"parallel_config": PARALLEL | {"use_ubatching": True}}, "dual-batch"),
        ({}, "VLLM_BATCH_INVARIANT=True"),
        ({"scheduler_config": {"disable_hybrid_kv_cache_manager": True}}, "disable_hybrid_kv_cache_manager"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_features_that_are_refused(changes, message, monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", str(int(message.startswith("VLLM_BATCH"))))

    def config(**given):
        sections = {"cache_config": {"cache_dtype": "auto"}, "parallel_config": PARALLEL}
        sections |= {"scheduler_config": {"disable_hybrid_kv_cache_manager": False}}
        sections |= {"model_config": {"dtype": torch.float32, "quantization": "awq"}}
        sections |= {"speculative_config": None, "quant_config": None} | given
        return SimpleNamespace(
            **{name: SimpleNamespace(**value) if isinstance(value, dict) else value for name, value in sections.items()}
        )

    with pytest.raises(ValueError, match="is refused with an Attamba model") as refused:
        refuse_features(config(**changes))
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "0")
    refuse_features(config())
    refuse_features(config(cache_config={"cache_dtype": "float32"}))
    assert message in str(refused.value)


def test_tensors_map_to_their_parameters():
    mixers = "layers.3.attentive_ssm.mixers"
    assert target_shard("layers.3.k_ssm.in_proj.weight") == (f"{mixers}.in_proj.weight", 0)
    assert target_shard("layers.3.v_ssm.ssm_norm.weight") == (f"{mixers}.norm_weight", 1)
    assert target_shard("layers.3.v_ssm.out_proj.weight") == (f"{mixers}.out_proj.1.weight", None)
    assert target_shard("layers.0.feed_forward.w3.weight") == ("layers.0.feed_forward.gate_up_proj.weight", 1)
    assert target_shard("output.weight") == ("output.weight", None)


class TwoTensors(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.Linear(2, 1, bias=False)
        self.output = torch.nn.Linear(2, 3, bias=False)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"norm.weight": (1, 2)}, "lacks tensors of 1 parameters"),
        ({"norm.weight": (1, 2), "output.weight": (3, 2), "more.weight": (1,)}, "more.weight is refused"),
        ({"norm.weight": (1, 2), "output.weight": (3, 3)}, "output.weight of shape .3, 3. does not fit"),
    ],
    ids=["missing", "unknown", "misshapen"],
)
def test_a_checkpoint_that_does_not_fit(tensors, message):
    with pytest.raises(ValueError, match=message):
        load_checkpoint(TwoTensors(), [(name, torch.zeros(shape)) for name, shape in tensors.items()])
