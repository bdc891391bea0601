"""`starling calibrate --method ablation`: a server's divergences against those of the gated model."""

from __future__ import annotations

import pytest
import torch

from benchmarks.random_llama import make_random_llama
from starling.config.head_scores import HeadScores
from starling.lab.calibration.ablation import served_order
from starling.lab.calibration.gated_model import ANSWER_TOKENS, Case, GatedModel, ScoredPrompt
from starling.lab.evaluation.client import TOP_LOGPROBS
from starling.lab.statistics import kl_divergence

pytestmark = pytest.mark.engine

BLOCKS, QUERY = 8, 128
ORDER = [(0, 1), (1, 1), (0, 0), (1, 0)]
"""The KV of the last layer does not depend on its own heads: there is nothing to gain from one."""
IDS = tuple(torch.randint(0, 256, (1024,), generator=torch.Generator().manual_seed(1)).tolist())
COUNTS = [0, 1, 2, 4]


def most_probable(logprobs: torch.Tensor, token: int) -> dict[int, float]:
    """What a server tells of a distribution: its most probable tokens, and the one that was asked for."""
    known = {*logprobs.topk(TOP_LOGPROBS).indices.tolist(), token}
    return {one: float(logprobs[one]) for one in known}


def divergences_of(model: GatedModel, prompt: ScoredPrompt) -> list[float]:
    case = Case(model, prompt, BLOCKS, QUERY)
    answer = [*case.ids[len(prompt.token_ids) :], int(case.dense[-1].argmax())]
    answer = list(prompt.answer_ids[:ANSWER_TOKENS]) or answer
    found = []
    for count in COUNTS:
        gates = torch.zeros(2, 2)
        for layer, head in ORDER[:count]:
            gates[layer, head] = 1
        with torch.no_grad():
            other = model.log_probs(case.ids, case.places, gates, case.plan)
        rows = zip(case.dense, other, answer, strict=True)
        pairs = [(most_probable(one, token), most_probable(two, token)) for one, two, token in rows]
        found.append(sum(kl_divergence(*pair) for pair in pairs) / len(pairs))
    return found


def test_a_server_measures_what_gates_do(tmp_path):
    """With an answer, and at the model's own. The pages of one number of dense heads are not those of another."""
    sizes = {"hidden_size": 64, "head_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    folder = make_random_llama(tmp_path / "tiny", **sizes, num_key_value_heads=2)
    rank = {head: -float(place) for place, head in enumerate(ORDER)}
    scores = HeadScores(scores=tuple(tuple(rank[layer, head] for head in range(2)) for layer in range(2)))
    prompts = [ScoredPrompt("answered", IDS, (5, 6, 7, 8, 9)), ScoredPrompt("own", IDS[::-1], ())]
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--block-size", "32"]
    options += ["--gpu-memory-utilization", "0.1"]
    with served_order(str(folder), scores, BLOCKS, QUERY, COUNTS, options, tmp_path / "server.log") as measured:
        got = [measured(prompt) for prompt in prompts]
    model = GatedModel(folder, "cpu", torch.float32)
    for prompt, divergences in zip(prompts, got, strict=True):
        expected = divergences_of(model, prompt)
        assert divergences == pytest.approx(expected, rel=1e-2, abs=1e-5)
        none, one, two, every = expected
        assert none > 1.1 * one and one == two > 1e-3 and every < 1e-6
