"""The kinds of requests of the load, each with its share and the outcomes that it may have."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import aiohttp
import grpc

from benchmarks.soak.bad_requests import GRPC_REFUSALS, HTTP_REFUSALS
from benchmarks.soak.cases import BLOCKS, MESSAGES, Case, random_ids, random_text
from benchmarks.soak.hostile import hostile
from benchmarks.soak.ledger import ABORTED, ANSWERED, DIFFERENT, LEFT, REFUSED
from benchmarks.soak.player import Player
from benchmarks.soak.relay import Cut, Relay
from benchmarks.soak.target import STARLING, Clients, Output, RefusedError, Target, body_of, fields_of
from starling.client import StarlingError
from starling.v1 import admin_pb2 as admin

LONG_PROMPT, LONG_OUTPUT = 4000, 1000
CUT_WHILE_SENDING = "Internal error from Core"  # grpc.aio's own message, in place of UNAVAILABLE


@dataclass(frozen=True)
class Kind:
    """A kind of request.

    Attributes:
        share: share of all requests, relative to those of the other kinds.
        play: function that sends one, and returns its outcome.
        accepts: its possible outcomes.
        brief: True if it keeps a client only for as long as the server needs.
        plain: True if vLLM without Starling answers it too; it then ignores star options.
        misbehaves: True if its clients do what they should not, or are ended.
    """

    name: str
    share: float
    play: Callable[[Player], Awaitable[str]]
    accepts: frozenset[str] = frozenset({ANSWERED})
    brief: bool = True
    plain: bool = False
    misbehaves: bool = False


def kinds_for(target: Target) -> list[Kind]:
    """Return the kinds that a server gets."""
    return [kind for kind in KINDS if kind.plain or target.front == STARLING]


def options(player: Player) -> dict[str, Any]:
    """Return a salt and a priority, or neither."""
    salt = player.random.choice([None, None, "tenant a", "tenant b"])
    return {"priority": player.random.choice([0, 0, -1, 2])} | ({"cache_salt": salt} if salt else {})


async def http(player: Player) -> str:
    case, stream = player.any_case(), player.random.random() < 0.6
    headers = {"x-starling-progress": "true"} if stream and player.random.random() < 0.5 else None
    body = body_of(case, player.model) | {"stream": stream} | options(player)
    return player.check(case, await player.clients.complete(body, headers))


async def grpc_stream(player: Player, upload: bool) -> str:
    case = player.any_case()
    fields = fields_of(case) | options(player) | {"progress": player.random.random() < 0.5}
    return player.check(case, await player.clients.stream(case.prompt, upload=upload, **fields))


async def grpc_unary(player: Player) -> str:
    case = player.any_case()
    return player.check(case, await player.clients.generate(case.prompt, **fields_of(case), **options(player)))


async def chat(player: Player) -> str:
    """Send a chat over HTTP and gRPC; both have the same text."""
    kinds = {"dense": {}, "star": BLOCKS, "messages": MESSAGES}
    seed, kind = player.random.randrange(3), player.random.choice(list(kinds))
    star, count = kinds[kind], 3 if kind == "messages" else 1
    messages = [{"role": "user", "content": random_text(f"chat {seed} {i}", 400 // count)} for i in range(count)]
    body = {"model": player.model, "messages": messages, "temperature": 0, "max_tokens": 8, "vllm_xargs": star}
    name = f"chat {seed}, {kind}"
    if player.over_http():
        return player.check_named(name, await player.clients.chat(body))
    reply = await player.clients.grpc.generate(messages=messages, temperature=0, max_tokens=8, star=star)
    return player.check_named(name, Output({0: [reply.text]}, {0: "length"}))


async def texts(player: Player) -> str:
    """Send documents over gRPC as texts, in an order by chance."""
    first = player.random.randrange(4)
    documents = [random_text(f"text {(first + index) % 4}", 200) for index in range(3)]
    prompt = [*documents, random_text("query of texts", 40)]
    output = await player.clients.generate(prompt, max_tokens=8, temperature=0, ignore_eos=True, star="on")
    return player.check_named(f"texts from {first}", output)


async def live_page(player: Player) -> str:
    """Read what somebody sees who looks at the page of requests."""
    page, data = await player.clients.live("/starling/live"), await player.clients.live("/starling/live.json")
    return ANSWERED if b"<html" in page and b'"requests"' in data else "no page of requests"


async def choices(player: Player) -> str:
    """Ask for several sampled choices, and check their number and lengths."""
    number, case = player.random.choice([2, 3]), player.any_case(free=True)
    sampled = {"n": number, "temperature": 1.0}
    if player.over_http():
        output = await player.clients.complete(body_of(case, player.model) | options(player) | sampled)
    else:
        fields = fields_of(case) | options(player) | sampled
        output = await player.clients.stream(case.prompt, **fields)
    lengths = {index: len(tokens) for index, tokens in output.tokens.items()}
    return ANSWERED if lengths == dict.fromkeys(range(number), case.max_tokens) else DIFFERENT


async def tokenize(player: Player) -> str:
    text = random_text(str(player.random.random()), player.random.choice([50, 5000, 20_000]))
    if player.over_http():
        async with player.clients.post("/tokenize", {"model": player.model, "prompt": text}) as response:
            count = (await response.json())["count"]
    else:
        count = (await player.clients.grpc.tokenize(text)).count
    return ANSWERED if count == len(text) else DIFFERENT


async def refused_http(player: Player) -> str:
    bad = player.random.choice(HTTP_REFUSALS)
    body = bad.change(body_of(Case(bad.name, random_ids(bad.name, 300), BLOCKS), player.model), player.target.queue)
    try:
        async with player.clients.post(bad.path, body, bad.headers):
            return f"{bad.name} was not refused"
    except RefusedError as error:
        if error.args[0] == bad.status:
            return REFUSED
        raise


async def refused_grpc(player: Player) -> str:
    bad = player.random.choice(GRPC_REFUSALS)
    try:
        await player.clients.generate(bad.prompt, **{"max_tokens": 2} | bad.fields(player.target.queue))
        return f"{bad.name} was not refused"
    except StarlingError as error:
        if error.code is bad.code:
            return REFUSED
        raise


async def vanish(player: Player, front: str, cut: Callable[[Player], Cut], prompt: int, stream: bool = True) -> str:
    """Send a request through a relay, which cuts its connection."""
    star = player.random.choice([{}, BLOCKS | {"star_block_size": 512}, player.spread])
    case = Case("vanish", random_ids(str(player.random.random()), prompt), star, LONG_OUTPUT)
    async with Relay(getattr(player.target, front), cut(player)) as relay:
        address = f"127.0.0.1:{relay.port}"
        near = replace(player.target, http=address) if front == "http" else replace(player.target, grpc=address)
        async with Clients(near) as clients:
            try:
                if front == "grpc" and not stream:
                    await clients.generate(case.prompt, **fields_of(case))
                elif front == "grpc":
                    upload = player.random.random() < 0.5
                    await clients.stream(case.prompt, upload=upload, logprobs=5, **fields_of(case))
                else:
                    await clients.complete(body_of(case, player.model) | {"stream": stream, "logprobs": 5})
            except aiohttp.ClientError:
                if relay.cuts:
                    return LEFT
                raise
            except StarlingError as error:
                own = error.code is grpc.StatusCode.UNAVAILABLE or error.message == CUT_WHILE_SENDING
                if relay.cuts and own:
                    return LEFT
                raise
    return ANSWERED


async def abort(player: Player) -> str:
    """Send a long request, which AdminService ends."""
    name, case = uuid.uuid4().hex, Case("", random_ids(str(player.random.random()), 600), player.spread, LONG_OUTPUT)
    running = asyncio.ensure_future(player.clients.stream(case.prompt, request_id=name, **fields_of(case)))
    try:
        await asyncio.sleep(player.random.random() * 0.5)
        while not running.done():  # the server may not know the request yet
            await player.clients.control("Abort", admin.AbortRequest(request_ids=[name]))
            await asyncio.wait({running}, timeout=1)
        output = await running
    finally:
        running.cancel()
    return ABORTED if output.finished == {0: "abort"} else ANSWERED


async def control(player: Player) -> str:
    """Reset the prefix cache, and read what operators read."""
    name = player.random.choice(["ResetPrefixCache", "GetServerInfo", "GetCacheState"])
    await player.clients.control(name, getattr(admin, f"{name}Request")())
    await player.clients.grpc.capabilities()
    return ANSWERED


async def scrape(player: Player) -> str:
    return ANSWERED if "vllm:" in await player.clients.metrics() else "no metrics"


def in_prefill(player: Player) -> Cut:
    return Cut(seconds=player.random.uniform(0.02, 0.3), reset=player.random.random() < 0.5)


def in_decode(player: Player) -> Cut:
    return Cut(received=player.random.randrange(3_000, 30_000), reset=player.random.random() < 0.5)


def in_upload(player: Player) -> Cut:
    return Cut(sent=player.random.randrange(500, 3_500), reset=player.random.random() < 0.5)


def stops_reading(player: Player) -> Cut:
    return Cut(received=5_000, hold=player.hold_seconds, reset=True)


def stays_connected(player: Player) -> Cut:
    """Return the cut of a client whose network is gone: neither a FIN nor a RST comes, for a while."""
    return Cut(seconds=player.random.uniform(0.02, 0.5), hold=player.hold_seconds, reset=True)


def vanishing(
    when: str, cut: Callable[[Player], Cut], prompt: int, share: float, brief: bool = True, stream: bool = True
) -> list[Kind]:
    """Return kinds of clients of each front that vanish at a moment; ``prompt`` is their prompt tokens."""
    return [
        Kind(
            f"{when}, {front}",
            share,
            partial(vanish, front=front, cut=cut, prompt=prompt, stream=stream),
            GONE,
            brief,
            plain=front == "http",
            misbehaves=True,
        )
        for front in ("http", "grpc")
    ]


GONE = frozenset({LEFT, ANSWERED})
KINDS = [
    Kind("HTTP", 20, http, plain=True),
    Kind("gRPC stream", 14, partial(grpc_stream, upload=False)),
    Kind("gRPC upload", 6, partial(grpc_stream, upload=True)),
    Kind("gRPC unary", 8, grpc_unary),
    Kind("chat", 4, chat, plain=True),
    Kind("choices", 5, choices, plain=True),
    Kind("tokenize", 4, tokenize, plain=True),
    Kind("documents, texts", 3, texts),
    Kind("live page", 2, live_page),
    Kind("refused, http", 6, refused_http, frozenset({REFUSED}), misbehaves=True),
    Kind("refused, grpc", 6, refused_grpc, frozenset({REFUSED}), misbehaves=True),
    Kind("hostile", 4, hostile, frozenset({REFUSED, ANSWERED}), misbehaves=True),
    *vanishing("vanishes in prefill", in_prefill, LONG_PROMPT, 2),
    *vanishing("vanishes in decode", in_decode, 300, 2),
    *vanishing("vanishes in upload", in_upload, LONG_PROMPT, 2),
    *vanishing("vanishes unstreamed", in_prefill, LONG_PROMPT, 1, stream=False),
    *vanishing("vanishes and stays connected", stays_connected, 300, 0.5, brief=False),
    *vanishing("stops reading", stops_reading, 300, 0.5, brief=False),
    Kind("aborted", 4, abort, frozenset({ABORTED, ANSWERED}), misbehaves=True),
    Kind("control", 3, control),
    Kind("scrape", 2, scrape, plain=True),
]
