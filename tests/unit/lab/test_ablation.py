"""Scores without gradients: what several orders of the heads say of each head."""

from __future__ import annotations

import asyncio
import contextlib
import json
from itertools import pairwise
from types import SimpleNamespace

import pytest

from benchmarks.random_llama import make_random_llama
from starling.config.head_scores import read_scores
from starling.engine_ext.serving.cli.main import main
from starling.lab.calibration import scorers
from starling.lab.calibration.ablation import divergences, fitted_scores, group_counts, random_orders
from starling.lab.calibration.gated_model import ScoredPrompt, layers_of
from starling.lab.calibration.scorers import part_of
from starling.lab.evaluation.answers import Completion, ServerError
from starling.lab.evaluation.store import TokenScore
from starling.lab.models import ModelError

HEADS = [(layer, head) for layer in range(6) for head in range(5)]
TRUE = {(0, 3): 0.5, (2, 1): 0.3, (5, 4): 0.1}


def left_of(order, counts) -> list[float]:
    """The divergence that is left with so many heads dense, where each head takes away what it carries."""
    return [sum(TRUE.get(head, 0.0) for head in order[count:]) for count in counts]


def test_orders_are_the_same_in_each_run_and_have_all_heads():
    orders = random_orders(HEADS, 3)
    assert orders == random_orders(HEADS, 3)
    assert all(sorted(order) == HEADS for order in orders) and orders[0] != orders[1]


@pytest.mark.parametrize(("heads", "groups", "counts"), [(10, 4, [0, 2, 5, 7, 10]), (3, 16, [0, 1, 2, 3])])
def test_groups_are_as_equal_as_numbers_allow(heads, groups, counts):
    assert group_counts(heads, groups) == counts


def test_the_scores_are_what_the_heads_carry_where_orders_say_enough():
    orders, counts = random_orders(HEADS, 6), group_counts(len(HEADS), 10)
    found = fitted_scores(orders, counts, [left_of(order, counts) for order in orders])
    assert found == pytest.approx(dict.fromkeys(HEADS, 0.0) | TRUE, abs=0.02)


def test_heads_that_no_order_tells_apart_have_equal_scores():
    order, counts = HEADS, group_counts(len(HEADS), 10)
    found = fitted_scores([order], counts, [left_of(order, counts)])
    for first, stop in pairwise(counts):
        carried = sum(TRUE.get(head, 0.0) for head in order[first:stop])
        scores = [found[head] for head in order[first:stop]]
        assert scores == pytest.approx([carried / 3] * 3, rel=0.05, abs=1e-6)


def test_no_score_is_below_0():
    orders, counts = [HEADS, HEADS[::-1]], group_counts(len(HEADS), 10)
    rising = [0.1 * number for number in range(11)]
    assert set(fitted_scores(orders, counts, [rising, rising]).values()) == {0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return make_random_llama(tmp_path_factory.mktemp("models") / "tiny", **sizes, num_key_value_heads=2)


def run(folder, out, *arguments: str) -> int:
    settings = ["--lengths", "1200", "--prompts-per-cell", "1", "--prompt-format", "text", "--tasks", "fwe"]
    return main(["calibrate", str(folder), "--method", "ablation", "--out", str(out), *settings, *arguments])


class Servers:
    """Servers that are not started: head 1 of layer 1 carries all of the divergence.

    Attributes:
        asked: the order of the heads, the counts and the server's options, for each prompt that was measured.
        fails_at: the prompt at which a server fails, by its number.
    """

    def __init__(self) -> None:
        self.asked: list[tuple] = []
        self.fails_at: int | None = None

    @contextlib.contextmanager
    def served_order(self, model, scores, blocks, query_tokens, counts, options, log):
        def measured(prompt):
            if len(self.asked) == self.fails_at:
                raise ServerError("gone")
            self.asked.append((scores.order, list(counts), options))
            return [0.4 if (1, 1) in scores.order[count:] else 0.0 for count in counts]

        log.touch()
        yield measured


@pytest.fixture
def servers(monkeypatch) -> Servers:
    fakes = Servers()
    monkeypatch.setattr(scorers, "served_order", fakes.served_order)
    return fakes


def test_the_command_asks_a_server_for_each_order_and_goes_on_where_one_failed(folder, tmp_path, servers, capsys):
    out = tmp_path / "scores.json"
    options = ["--orders", "3", "--groups", "2", "--max-num-seqs", "4", "--dtype", "float32"]
    servers.fails_at = 2
    assert run(folder, out, *options) == 1
    assert f"gone\nThe scores so far are in {part_of(out)}: the same command goes on" in capsys.readouterr().err
    assert list(json.loads(part_of(out).read_text())["values"]) == ["order 1 of 3", "order 2 of 3"]
    servers.fails_at = None
    assert run(folder, out, *options, "--quantization", "fp8") == 2
    assert "has scores of another model or other options" in capsys.readouterr().err
    assert run(folder, out, *options) == 0
    scores = read_scores(str(out))
    assert scores.order[0] == (1, 1)
    made = {"method": "ablation", "dtype": "float32", "serve_options": ["--max-num-seqs", "4"]}
    assert made.items() <= scores.setup.items()
    assert scores.curve[0] == (0.0, 0.4) and scores.curve[-1] == (0.5, 0.0)
    orders = [order for order, _, _ in servers.asked]
    assert len(orders) == 4 and len(set(orders[:3])) == 3 and orders[3] == scores.order, "the last one is the curve's"
    assert [counts for _, counts, _ in servers.asked] == [[0, 2, 4]] * 3 + [[0, 1, 2]]
    assert servers.asked[0][2] == ["--max-num-seqs", "4", "--dtype", "float32", "--block-size", "32"]
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "gradient", "--max-num-seqs", "4"], "unknown options: --max-num-seqs 4. A server's go with"),
        (["--method", "gradient", "--orders", "6"], "orders=6 is refused: it does not go with --method gradient"),
        (["--steps", "3"], "steps=3 is refused: it does not go with --method ablation"),
        (["--device", "cuda"], "device='cuda' is refused: it does not go with --method ablation"),
        (["--api-key", "secret"], "--api-key is refused: it is chosen here"),
        (["--star_heads=scores.json"], "--star_heads=scores.json is refused: it is chosen here"),
        (["--groups", "1"], "groups=1 is refused"),
    ],
)
def test_options_of_the_other_method_are_refused(folder, tmp_path, servers, arguments, message, capsys):
    assert run(folder, tmp_path / "scores.json", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not servers.asked


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"num_hidden_layers": 2, "num_attention_heads": 4}, ([True, True], 4)),
        ({"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}, ([True], 2)),
        ({"num_hidden_layers": 1, "num_attention_heads": 4, "multi_query": True}, ([True], 1)),
        ({"layer_types": ["sliding_attention", "full_attention"], "num_attention_heads": 4}, ([False, True], 4)),
        ({"layer_types": ["hybrid"], "num_attention_heads": 4}, None),
        ({"num_hidden_layers": 1, "num_attention_heads": 4, "sliding_window": 128}, None),
    ],
)
def test_the_layers_of_a_model_are_those_of_its_configuration(fields, found):
    text = SimpleNamespace(**fields)
    config = SimpleNamespace(get_text_config=lambda: text)
    if found is None:
        with pytest.raises(ModelError, match="the model has no layers of full attention, but"):
            layers_of(config)
    else:
        assert layers_of(config) == found


class PlanningClient:
    """A server that answers every prompt with the same probabilities, and makes these sizes of a plan."""

    def __init__(self, **sizes: int) -> None:
        self.sizes = sizes

    async def score_token(self, token_ids, plan, token_id):
        numbers = {"block_size": 128, "anchor_size": 128, "dense_heads": 0.5, "context_end": 100}
        score = TokenScore(logprob=-0.1, top={token_id: -0.1})
        return Completion("", None, [token_id], numbers | self.sizes, score)

    async def complete(self, token_ids, plan, max_tokens):
        return Completion("", None, [], None)


def test_blocks_without_an_overlap_are_refused():
    """The pages of vLLM's CPU servers have 128 tokens, so that n/16 of a short prompt would be the paper's plan."""
    prompt = ScoredPrompt("a", tuple(range(1024)), (1, 2))
    with pytest.raises(ModelError, match=r"n/16 of 1024 tokens is refused.*blocks of 128 tokens have no overlap"):
        asyncio.run(divergences(PlanningClient(overlap_size=0), prompt, 16, 128, [0, 1], 4))
    assert asyncio.run(divergences(PlanningClient(overlap_size=32), prompt, 16, 128, [0, 1], 4)) == [0.0, 0.0]
    unanswered = ScoredPrompt("a", tuple(range(1024)), ())
    with pytest.raises(ModelError, match="the model gives no answer"):
        asyncio.run(divergences(PlanningClient(overlap_size=32), unanswered, 16, 128, [0, 1], 4))
