"""The trace of coding agents, and its play on a scheduler in simulated time."""

from __future__ import annotations

import pytest

from benchmarks.agents.conversation import conversations
from benchmarks.agents.cost import Machine
from benchmarks.agents.simulator import Setting, Simulator
from benchmarks.agents.trace import Session, Shape, Turn, make_trace, summary

SMALL = Shape().scaled(64)


def test_the_trace_has_the_shape_that_users_report():
    shape = summary(make_trace(Shape(), 24))
    assert shape["prompt_median"] == pytest.approx(142_000, rel=0.1)
    assert shape["answer_median"] == pytest.approx(444, rel=0.1)
    assert shape["turns_median"] == pytest.approx(43, rel=0.1)
    assert shape["kept"] > 0.96


def test_a_turn_begins_with_all_before_it_until_the_session_is_compacted():
    for session in make_trace(SMALL, 8):
        for before, turn in zip(session.turns, session.turns[1:], strict=False):
            assert turn.kept in (before.prompt + before.answer, SMALL.shared)
            assert turn.prompt <= SMALL.compact_at
    turns = [turn for session in make_trace(SMALL, 8) for turn in session.turns]
    assert any(turn.kept == SMALL.shared for turn in turns[1:])


def test_prompts_of_a_conversation():
    session = Session(0.0, [Turn(3, 4, 2, 1.0), Turn(9, 5, 1, 1.0), Turn(3, 2, 1, 1.0)])
    (conversation,) = conversations([session])
    first = conversation.prompt()
    assert conversation.answered([7, 7]) == 1.0
    second = conversation.prompt()
    conversation.answered([7])
    third = conversation.prompt()
    conversation.answered([7])
    assert second[:9] == [*first, 7, 7] and len(second) == 14
    assert third[:3] == first[:3] and len(third) == 5
    assert conversation.turn is None


def test_a_step_takes_longer_with_more_tokens_deeper_tokens_and_more_keys():
    machine = Machine()
    small = machine.step_seconds([(0, 2048, None)])
    assert small < machine.step_seconds([(0, 4096, None)])
    assert small < machine.step_seconds([(100_000, 2048, None)])
    decode = machine.step_seconds([(1000, 1, None)])
    assert decode < machine.step_seconds([(100_000, 1, None)]) < small


@pytest.mark.parametrize(
    "setting", [Setting(), Setting(ours=True), Setting(ours=True, star={"star": "on", "star_block_size": 128})]
)
def test_every_request_of_a_trace_is_played(setting):
    trace = make_trace(SMALL, 3)
    simulator = Simulator(Machine(cache_tokens=64 * 500), 2 * SMALL.compact_at, setting)
    outcome = simulator.play(trace)
    turns = [turn for session in trace for turn in session.turns]
    assert len(outcome.first_tokens) == len(turns)
    assert outcome.output_tokens == sum(turn.answer for turn in turns)
    assert outcome.prompt_tokens == sum(turn.prompt for turn in turns)
    assert 0.5 < outcome.summary()["cached"] < 1
    assert not simulator.scheduler.requests
