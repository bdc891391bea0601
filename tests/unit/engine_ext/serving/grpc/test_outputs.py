"""vLLM's outputs as messages of starling.v1."""

import pytest
from vllm.logprobs import Logprob
from vllm.v1.engine import FINISH_REASON_STRINGS

from starling.config.star import StarOptions
from starling.engine_ext.serving.grpc import outputs
from starling.reply import Reply
from starling.scheduler.planning.plan import context_pairs, describe
from starling.v1 import inference_pb2 as pb
from tests.unit.engine_ext.serving.grpc.fakes import output
from tests.unit.plans import make_plan


@pytest.mark.parametrize("reason", [name for name in FINISH_REASON_STRINGS if name != "error"])
def test_every_finish_reason_of_vllm_has_a_number(reason):
    plan = {"attention": "dense", "prompt_tokens": 3}
    final = outputs.final(output("", finish_reason=reason), pb.Usage(), plan).final
    assert pb.Final.FinishReason.Name(final.finish_reason) == f"FINISH_REASON_{reason.upper()}"


@pytest.mark.parametrize(
    ("reason", "which", "value"),
    [(None, None, None), ("END", "stop_string", "END"), (0, "stop_token_id", 0)],
    ids=["end token", "string", "token zero"],
)
def test_stop_reason(reason, which, value):
    plan = {"attention": "dense", "prompt_tokens": 3}
    final = outputs.final(output("", finish_reason="stop", stop_reason=reason), pb.Usage(), plan).final
    assert final.WhichOneof("stop_reason") == which
    assert which is None or getattr(final, which) == value


def test_star_plan_message():
    plan = make_plan(
        1000,
        StarOptions(mode="on", block_size=256, anchor_size=64, overlap_size=32, query_tokens=40),
        None,
        32,
    )
    message = outputs.plan_message(describe(plan, 1000))
    assert message.attention == pb.Plan.ATTENTION_STAR
    assert (message.star_blocks, message.block_size, message.anchor_size) == (4, 256, 64)
    assert (message.overlap_size, message.context_end, message.prompt_tokens) == (32, 960, 1000)
    assert 0 < message.keys_attended < message.dense_keys == 500500
    assert message.keys_per_context_token == pytest.approx(context_pairs(plan) / 960, abs=0.06)


def test_dense_plan_message_counts_the_keys():
    message = outputs.plan_message(describe(None, 1000))
    assert message.attention == pb.Plan.ATTENTION_DENSE
    assert message.keys_attended == message.dense_keys == 500500
    assert (message.star_blocks, message.keys_per_context_token) == (0, 500.5)


def delta(new, top=None) -> pb.Delta:
    (event,) = outputs.deltas(new, top)
    return event.delta


# vLLM's order: the chosen token, then the likeliest; one that is both stands first.
OUTSIDE = {9: Logprob(-5.0, 40, "z"), 2: Logprob(-0.5, 1, "a"), 3: Logprob(-1.5, 2, "b")}
INSIDE = {3: Logprob(-1.5, 2, "b"), 2: Logprob(-0.5, 1, "a")}


@pytest.mark.parametrize(
    ("token_id", "position", "top", "likeliest"),
    [
        (9, OUTSIDE, 2, [2, 3]),
        (3, INSIDE, 2, [2, 3]),
        (9, {9: Logprob(-5.0, 40, "z")}, 0, []),
        (2, {2: Logprob(-0.5, 1, "a")}, 0, []),
        (9, OUTSIDE, -1, [2, 3, 9]),
    ],
    ids=["chosen is not on top", "chosen is", "none", "none though likeliest", "all"],
)
def test_token_logprobs(token_id, position, top, likeliest):
    message = outputs.token_logprobs(token_id, position, top)
    assert message.chosen.token_id == token_id
    assert message.chosen.logprob == position[token_id].logprob
    assert (message.chosen.rank, message.chosen.text) == (position[token_id].rank, position[token_id].decoded_token)
    assert [entry.token_id for entry in message.top] == likeliest


def test_delta_has_a_logprob_for_each_of_its_tokens_and_no_more():
    new = output("ab", 3, token_ids=[9, 3], logprobs=[OUTSIDE, INSIDE])
    message = delta(new, 2)
    assert (message.index, [entry.chosen.token_id for entry in message.logprobs]) == (3, [9, 3])
    end = output("c", token_ids=[], logprobs=[OUTSIDE, INSIDE])  # held back text: vLLM repeats what was there
    assert not delta(end, 2).logprobs
    assert not delta(new).logprobs


def test_prompt_logprobs_have_an_empty_first():
    message = outputs.prompt_logprobs([5, 9, 3], [None, OUTSIDE, INSIDE], 1).prompt_logprobs
    assert not message.tokens[0].HasField("chosen")
    assert [entry.chosen.token_id for entry in message.tokens[1:]] == [9, 3]
    assert [[top.token_id for top in entry.top] for entry in message.tokens[1:]] == [[2], [2]]


def test_a_reply_combines_events():
    reply = Reply()
    plan = {"attention": "dense", "prompt_tokens": 3}
    for event in (
        outputs.prompt_logprobs([5], [None], 1),
        *outputs.deltas(output("x", 1, token_ids=[9], logprobs=[OUTSIDE]), 2),
        *outputs.deltas(output("a", 0), None),
        *outputs.deltas(output("bc", 0), None),
        outputs.final(output("", 1, finish_reason="stop", stop_reason="END"), pb.Usage(completion_tokens=1), plan),
        outputs.final(
            output("", 0, finish_reason="length"), pb.Usage(prompt_tokens=3, cached_tokens=2, completion_tokens=3), plan
        ),
    ):
        reply.add(event)
    whole = reply.response()
    assert [(choice.index, choice.text, list(choice.token_ids)) for choice in whole.choices] == [
        (0, "abc", [7, 7, 7]),
        (1, "x", [9]),
    ]
    assert whole.choices[0].finish_reason == pb.Final.FINISH_REASON_LENGTH
    assert (whole.choices[1].stop_string, len(whole.choices[1].logprobs)) == ("END", 1)
    assert whole.usage == pb.Usage(prompt_tokens=3, cached_tokens=2, completion_tokens=4)
    assert whole.plan.attention == pb.Plan.ATTENTION_DENSE
    assert len(whole.prompt_logprobs.tokens) == 1


@pytest.mark.parametrize(("top", "width"), [(20, 21), (-1, 1000)], ids=["some", "the whole vocabulary"])
def test_many_log_probabilities_are_split_into_messages_that_clients_accept(top, width):
    """A slow reader gets the log probabilities of thousands of tokens at once."""
    position = {token: Logprob(-float(token), token + 1, "x" * 8) for token in range(width)}
    tokens = 4000 if top > 0 else 200
    new = output("text", 1, token_ids=[3] * tokens, logprobs=[position] * tokens)
    events = [event.delta for event in outputs.deltas(new, top)]
    assert len(events) > 1
    assert max(event.ByteSize() for event in events) < 4 * 2**20
    assert "".join(event.text for event in events) == "text"
    assert sum(len(event.token_ids) for event in events) == tokens
    assert all(len(event.logprobs) == len(event.token_ids) for event in events)
    assert {event.index for event in events} == {1}
    assert len(list(outputs.deltas(new))) == 1, "without log probabilities there is nothing to split"
