"""Streaming-input sessions, whose prompts come in pieces, on vLLM's AsyncLLM: they run dense, or are refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from vllm.engine.protocol import StreamingInput
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, SamplingParams

from starling.engine_ext.front.observability import front_metrics
from starling.scheduler.planning.request_metadata import KEY
from tests.unit.engine_ext.front.simulation import Server
from tests.unit.scheduler.simulation import random_ids

PIECES = [5, 300, 520]
MESSAGE = "is refused: the prompt of a streaming-input session comes in pieces.*Allowed: star=off or star=auto"


@pytest.fixture
def with_defaults(server_config, monkeypatch):
    """Gives the server its star options."""
    return lambda star: monkeypatch.setattr(server_config, "additional_config", {"starling": star})


def params_of(star: dict | None) -> SamplingParams:
    return SamplingParams(max_tokens=2, output_kind=RequestOutputKind.DELTA, extra_args=star)


async def run_session(server: Server, star: dict | None, piece: dict | None = None) -> list:
    """The engine requests of a session whose pieces all have arrived.

    Args:
        star: the star options of the session.
        piece: those of each piece; None: the session's.
    """
    arrived = []
    all_arrived = asyncio.Event()

    async def add_request(request) -> None:
        arrived.append(request)
        if len(arrived) > len(PIECES):  # vLLM sends one more, without input, at the end
            all_arrived.set()

    async def pieces() -> AsyncGenerator[StreamingInput, None]:
        for length in PIECES:
            prompt = {"type": "token", "prompt_token_ids": random_ids(length, length)}
            yield StreamingInput(prompt, None if piece is None else params_of(piece))

    server.client.add_request_async = add_request
    outputs = server.engine.generate(pieces(), params_of(star), "me")
    running = asyncio.ensure_future(anext(outputs))
    waiting = asyncio.ensure_future(all_arrived.wait())
    await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if running.done():
        running.result()
    running.cancel()
    await asyncio.wait({running})
    return arrived


async def no_pieces() -> AsyncGenerator[StreamingInput, None]:
    return
    yield


ON = {"star": "on", "star_block_size": 64}
AUTO = ON | {"star": "auto", "star_min_tokens": 100}


@pytest.mark.parametrize(
    ("server_star", "star"),
    [
        (AUTO, None),
        (AUTO, {"star_block_size": 128}),
        (ON, None),
        (ON, {"star": "auto"}),
        ({}, {"star": "auto", "star_min_tokens": 100, "star_query_tokens": 10}),
    ],
    ids=["auto", "auto with sizes", "on", "auto over on", "auto over off"],
)
def test_a_session_runs_dense_and_is_counted_once(simulate, with_defaults, server_star, star):
    with_defaults(server_star)

    async def scenario(server):
        counts = [front_metrics().requests.labels(name)._value for name in ("dense", "star")]
        before = [count.get() for count in counts]
        requests = await run_session(server, star)
        assert [len(request.prompt_token_ids) for request in requests] == [*PIECES, 1]
        assert all("plan" not in request.sampling_params.extra_args[KEY] for request in requests)
        assert [count.get() - b for count, b in zip(counts, before, strict=True)] == [1, 0]

    simulate(scenario)


@pytest.mark.parametrize(
    ("server_star", "star", "option"),
    [({}, {"star": "on"}, "star='on'"), (AUTO, {"star": "on"}, "star='on'"), (ON, {"star_block_size": 128}, "128")],
    ids=["on", "on over auto", "sizes over on"],
)
def test_a_session_that_asks_for_star_is_refused_before_its_response_starts(
    simulate, with_defaults, server_star, star, option
):
    with_defaults(server_star)

    async def scenario(server):
        with pytest.raises(VLLMValidationError, match=f"{option} {MESSAGE}"):
            server.engine.generate(no_pieces(), params_of(star), "me")

    simulate(scenario)


def test_a_piece_that_asks_for_star_ends_its_session(simulate, with_defaults):
    with_defaults(AUTO)

    async def scenario(server):
        with pytest.raises(VLLMValidationError, match=f"star='on' {MESSAGE}"):
            await run_session(server, None, piece={"star": "on"})

    simulate(scenario)
