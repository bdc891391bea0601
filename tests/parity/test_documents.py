"""Documents, against plain torch that rotates queries and keys from scratch.

A prompt's documents are computed once. In other prompts they stand elsewhere, in another order, beside others: their KV
is reused, and the answer is that of computing everything.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from itertools import accumulate, chain, pairwise
from typing import Any

import pytest
import torch
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.model_executor.models.ernie45 import Ernie4_5ForCausalLM

from benchmarks.random_llama import make_random_llama
from tests.parity.documents import block_logprobs, dense_logprobs
from tests.parity.harness import NEEDS_FP8, TINY, max_gap, run_engine, star, v2_env

pytestmark = pytest.mark.engine

PAGE_SIZE, MARK, NEW, LIMIT = 32, 255, 4, 1e-4
RUNNERS = {
    "v1": {"max_num_batched_tokens": 97},
    "v1-compiled": {"max_num_batched_tokens": 300, "enforce_eager": False},
    "v1-tp2": {"max_num_batched_tokens": 300, "tensor_parallel_size": 2},
    "v2": {"max_num_batched_tokens": 97, "env": v2_env()},
}


def tokens_of(seed: int, length: int) -> list[int]:
    tokens = random.Random(seed)
    return [tokens.randrange(MARK) for _ in range(length)]


def document(seed: int, length: int) -> list[int]:
    return [MARK, *tokens_of(seed, length - 1)]


@dataclass(frozen=True)
class Prompt:
    """A head, documents of any length, and a question of 17 tokens."""

    head: list[int]
    documents: list[list[int]]
    options: dict[str, Any] = field(default_factory=dict)
    question: list[int] = field(default_factory=lambda: tokens_of(99, 17))

    @property
    def ids(self) -> list[int]:
        return [*self.head, *chain.from_iterable(self.documents), *self.question]

    @property
    def context_end(self) -> int:
        return len(self.ids) - len(self.question)

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """The blocks: documents longer than ``star_block_size`` are cut."""
        borders = [0, *accumulate(len(part) for part in (self.head, *self.documents))]
        size = self.options.get("star_block_size", self.context_end)
        pieces = [
            (first, min(first + size, stop)) for start, stop in pairwise(borders) for first in range(start, stop, size)
        ]
        return pieces if self.head else [(0, 0), *pieces]

    @property
    def anchor_size(self) -> int:
        head = self.pieces[0][1]
        return min(self.options.get("star_anchor_size", head), head // PAGE_SIZE * PAGE_SIZE)

    def request(self, **fields: Any) -> dict[str, Any]:
        starts = [*accumulate((len(part) for part in self.documents[:-1]), initial=len(self.head))]
        options = {"star": "on", "star_segments": starts, "star_query_tokens": len(self.question)}
        return {"ids": self.ids, "extra_args": options | self.options, "max_tokens": NEW} | fields

    def expected(self, model: Any, token_ids: list[int]) -> torch.Tensor:
        return block_logprobs(model, self.ids + token_ids, self.pieces, self.anchor_size, self.context_end)

    def has_predecessor(self) -> torch.Tensor:
        """Whether each of ``ids[1:]`` follows a token that its KV depends on: all but the first of a block."""
        follows = torch.ones(len(self.ids), dtype=torch.bool)
        follows[[start for start, stop in self.pieces if stop]] = False
        follows[self.context_end] = False
        return follows[1:]

    def computed(self, *documents: list[int]) -> int:
        """Tokens to compute if all but these documents are cached: their pages, and the question."""
        return sum(-(-len(one) // PAGE_SIZE) * PAGE_SIZE for one in documents) + len(self.question)


HEAD = tokens_of(1, 70)
A, B, C, D, E = (document(seed, length) for seed, length in enumerate((100, 33, 64, 200, 5), 10))
PROMPTS = [
    Prompt(HEAD, [A, B, C, D, E]),
    Prompt(HEAD, [D, A], {"star_anchor_size": 32}),
    Prompt(HEAD, [B, C, D], {"star_anchor_size": 0}),
    Prompt(HEAD[:64], [C, C, B]),  # a head of whole pages; one document twice
    Prompt(HEAD[:20], [A, D]),  # a head shorter than a page: no anchor
    Prompt([], [A, B, C]),
    Prompt(HEAD, [A, D, E], {"star_block_size": 96}),  # D has three blocks
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_random_llama(tmp_path_factory.mktemp("models") / "tiny", **TINY)


def check(model: Any, prompt: Prompt, output: dict[str, Any]) -> None:
    token_ids = output["token_ids"]
    expected = prompt.expected(model, token_ids)
    assert max_gap(output["logprobs"], expected[-len(token_ids) :]) <= LIMIT
    if output["prompt_logprobs"] is not None:
        got, follows = torch.tensor(output["prompt_logprobs"]), prompt.has_predecessor()
        assert len(got) == len(prompt.ids) - 1
        assert max_gap(got[follows].tolist(), expected[: len(got)][follows]) <= LIMIT


@pytest.mark.parametrize("runner", RUNNERS)
def test_logprobs_are_those_of_positions_of_a_blocks_own(model, runner):
    """All prompts in one batch, beside a dense and a star request, and the first one also alone.

    A request that wants to stop with each token, but has to have some, stops as soon as it has them: the padding of its
    prompt, which the positions leave out, is no part of its output.
    """
    dense = {"ids": tokens_of(7, 150), "extra_args": {}, "max_tokens": NEW}
    other = dense | {"extra_args": star(64, 10)}
    requests = [prompt.request(prompt_logprobs=True) for prompt in PROMPTS]
    stops = {"min_tokens": 2, "stop_token_ids": [5], "logit_bias": {5: 1000}}
    batches = [[*requests, dense, other], [dense], requests[:1], [PROMPTS[0].request(max_tokens=9) | stops]]
    result = run_engine(model, batches, **RUNNERS[runner])["batches"]
    for prompt, output in zip([*PROMPTS, PROMPTS[0]], [*result[0][: len(PROMPTS)], *result[2]], strict=True):
        check(model, prompt, output)
    assert result[0][len(PROMPTS)]["token_ids"] == result[1][0]["token_ids"]
    assert len(result[3][0]["token_ids"]) == stops["min_tokens"] + 1
    first, tokens = PROMPTS[0], result[2][0]["token_ids"]
    dense_gap = (first.expected(model, tokens) - dense_logprobs(model, first.ids + tokens)).abs().max()
    assert dense_gap > 1000 * LIMIT


@pytest.fixture(scope="module")
def compiled_as_a_whole(tmp_path_factory):
    """An Ernie 4.5, whose top class in vLLM is compiled itself, and so runs no hooks.

    It is a Llama but for its rotary embedding, which rotates pairs of neighbours.
    """
    path = make_random_llama(tmp_path_factory.mktemp("models") / "ernie", **TINY)
    config = json.loads((path / "config.json").read_text())
    config |= {"architectures": ["Ernie4_5ForCausalLM"], "model_type": "ernie4_5", "use_bias": False}
    (path / "config.json").write_text(json.dumps(config))
    assert TorchCompileWithNoGuardsWrapper in Ernie4_5ForCausalLM.__mro__, "another model is needed here"
    return path


@pytest.mark.parametrize("runner", ["v1", "v1-compiled", "v2"])
def test_a_model_whose_class_is_compiled_as_a_whole_has_documents(compiled_as_a_whole, runner):
    requests = [prompt.request(prompt_logprobs=True) for prompt in PROMPTS[:4]]
    for prompt, output in zip(
        PROMPTS, run_engine(compiled_as_a_whole, [requests], **RUNNERS[runner])["batches"][0], strict=False
    ):
        check(compiled_as_a_whole, prompt, output)


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_a_document_is_reused_wherever_it_stands(model, runner):
    """Cached tokens are counted, and answers compared with the reference and with a run without a cache."""
    grown = [*D, 7]
    first, second = Prompt(HEAD, [A, B, C, D]), Prompt(HEAD, [C, E, A])
    steps = [
        ("cold", [first], [first.computed(HEAD, A, B, C, D)]),
        ("in another order", [Prompt(HEAD, [D, B, A, C])], [first.computed()]),
        ("one more at the front", [Prompt(HEAD, [E, A, B, C, D])], [first.computed(E)]),
        ("fewer", [Prompt(HEAD, [C, A])], [first.computed()]),
        ("one grown by a token", [Prompt(HEAD, [A, grown, B, C])], [first.computed(grown) - 192]),
        ("two prompts at once", [second, Prompt(HEAD, [E, D, C])], [first.computed(), first.computed()]),
        ("one twice", [Prompt(HEAD, [B, A, B])], [first.computed()]),
        ("another anchor", [Prompt([3, *HEAD[1:]], [A, B])], [first.computed(HEAD, A, B)]),
        ("a smaller anchor", [Prompt(HEAD, [A, B], {"star_anchor_size": 32})], [first.computed(A, B)]),
        ("a second question", [Prompt(HEAD, [D, B, A, C], question=tokens_of(98, 17))], [first.computed()]),
    ]
    cold = [[prompt.request(cold=True)] for _, prompts, _ in steps for prompt in prompts]
    warm = [[prompt.request() for prompt in prompts] for _, prompts, _ in steps]
    result = run_engine(model, warm + cold, max_num_batched_tokens=300, env={"v2": v2_env()}.get(runner))["batches"]
    alone = iter(result[len(steps) :])
    for (description, prompts, computed), outputs in zip(steps, result, strict=False):
        for prompt, count, output in zip(prompts, computed, outputs, strict=True):
            (cold_output,) = next(alone)
            assert output["cached"] == max(len(prompt.ids) - count, 0), description
            assert output["token_ids"] == cold_output["token_ids"], description
            assert max_gap(output["logprobs"], torch.tensor(cold_output["logprobs"])) <= 1e-5, description
            check(model, prompt, output)


def test_preempted_requests_give_the_same(model):
    """The KV cache is too small for the admitted requests: they are preempted while they decode, and resume."""
    requests = [prompt.request(max_tokens=150) for prompt in PROMPTS[:4]]
    large, small = (
        run_engine(model, [requests], max_num_batched_tokens=300, **sizes)
        for sizes in ({}, {"num_gpu_blocks_override": 54, "max_model_len": 1024})
    )
    assert large["metrics"]["vllm:num_preemptions"] == 0
    assert small["metrics"]["vllm:num_preemptions"] > 0
    for prompt, output, other in zip(PROMPTS, small["batches"][0], large["batches"][0], strict=False):
        assert output["token_ids"] == other["token_ids"]
        check(model, prompt, output)


@pytest.mark.parametrize(
    "engine",
    [{"dtype": "bfloat16"}, pytest.param({"kv_cache_dtype": "fp8"}, marks=NEEDS_FP8)],
    ids=["bfloat16", "fp8 cache"],
)
def test_low_precision_costs_no_more_than_it_costs_dense_attention(model, engine):
    """Re-rotated queries meet rounded keys; the error is that of dense attention over such keys.

    On a processor with AMX, vLLM would lay out bfloat16 keys for tiles. The server's default lets it not do so.
    """
    dense = [{"ids": prompt.ids, "extra_args": {"star": "off"}, "max_tokens": NEW} for prompt in PROMPTS]
    requests = [prompt.request() for prompt in PROMPTS]
    default = {"star": "on", "star_segments": "auto"}
    own, plain = run_engine(model, [requests, dense], star=default, max_num_batched_tokens=300, **engine)["batches"]

    def errors(outputs: list[dict[str, Any]], expected: Any) -> float:
        gaps = []
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            wanted = expected(prompt, output["token_ids"])[-NEW:]
            gaps.append(torch.tensor(output["logprobs"]) - wanted)
        return torch.stack(gaps).square().mean().sqrt().item()

    of_dense = errors(plain, lambda prompt, tokens: dense_logprobs(model, prompt.ids + tokens))
    assert 0 < errors(own, lambda prompt, tokens: prompt.expected(model, tokens)) <= 2 * of_dense
