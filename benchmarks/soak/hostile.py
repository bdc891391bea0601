"""Requests of hostile clients: each gets a short refusal, or does what it asks for, and nobody else waits."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import grpc

from benchmarks.soak.cases import BLOCKS, Case, random_ids
from benchmarks.soak.ledger import ANSWERED, FULL, REFUSED
from benchmarks.soak.target import body_of
from starling.v1 import inference_pb2 as pb

if TYPE_CHECKING:
    from benchmarks.soak.player import Player

MESSAGE_BYTES = 8 * 2**20 - 2**12
"""Of the worst message of each field: a little less than the server takes."""
MAX_ANSWER_BYTES = 16 * 2**10
"""Of what the server answers to it."""
MANY_CHOICES = 16384  # vLLM's own bound of `n`
SPELLINGS = ["Bearer", "bearer", "BEARER", "bEarer", "beArer", "beaRer", "BEArer", "beareR"]
STALLED, STALL_SECONDS, OTHERS_SECONDS = 24, 3, 30
NO_KEY_PATHS = ("/v1/completions", "/v1/chat/completions", "/invocations", "/tokenize", "/detokenize")
NO_KEY_PATHS += ("/generative_scoring", "/scale_elastic_ep", "/starling/live.json")
Attack = Callable[["Player"], Awaitable[str]]
"""Sends something; returns a status as `HTTP 400` or `INVALID_ARGUMENT`, or what is wrong with the answer."""


@dataclass(frozen=True)
class Hostile:
    """An attack, and the statuses that it may get."""

    name: str
    attack: Attack
    allowed: frozenset[str]


def filled(field: str) -> pb.GenerateStreamRequest:
    """Return a request whose field ``field`` is as large as a message can be."""
    request = pb.GenerateStreamRequest(sampling=pb.SamplingParams(max_tokens=1))
    text, sampling, star = "a" * MESSAGE_BYTES, request.sampling, request.star
    if field != "prompt" and not field.startswith("prompt of"):
        request.token_ids.ids.extend([5] * 20)
    match field:
        case "request_id" | "lora_name" | "cache_salt":
            setattr(request, field, text)
        case "prompt":
            request.text = text
        case "prompt of ids":
            request.token_ids.ids.extend([5] * MESSAGE_BYTES)
        case "prompt of texts":
            request.texts.texts.extend(["a"] * (MESSAGE_BYTES // 3))
        case "prompt of messages":
            request.chat.messages.extend([pb.ChatMessage(role="user", content="a")] * (MESSAGE_BYTES // 11))
        case "bad_words":
            sampling.bad_words.extend(["a"] * (MESSAGE_BYTES // 4))
        case "stop":
            sampling.stop.extend(["a"] * (MESSAGE_BYTES // 3))
        case "stop_token_ids":
            sampling.stop_token_ids.extend([5] * MESSAGE_BYTES)
        case "logit_bias":
            for token in range(500_000):
                sampling.logit_bias[token] = 1.0
        case "extra_args":
            sampling.extra_args = '{"a": ' + "[" * (MESSAGE_BYTES // 2 - 8) + "]" * (MESSAGE_BYTES // 2 - 8) + "}"
        case "regex" | "json_schema":
            setattr(sampling.structured_outputs, field, "(a|b)" * (MESSAGE_BYTES // 5))
        case "choices":
            sampling.structured_outputs.choices.choices.extend(f"choice {n}" for n in range(500_000))
        case "segments" | "block_size" | "quality":
            setattr(star, field, text)
        case "segment_offsets":
            star.segment_offsets.extend([2**20] * (MESSAGE_BYTES // 3))
    return request


FIELDS = ("request_id", "lora_name", "cache_salt", "prompt", "prompt of ids", "prompt of texts", "prompt of messages")
FIELDS += ("stop", "bad_words", "stop_token_ids", "logit_bias", "extra_args", "regex", "json_schema", "choices")
FIELDS += ("segments", "block_size", "quality", "segment_offsets")


@lru_cache(maxsize=len(FIELDS))
def message(field: str) -> bytes:
    """Return ``filled`` as bytes."""
    return filled(field).SerializeToString()


async def status_of(call: Awaitable[bytes]) -> str:
    """Return the name of a call's status, or that its message is long."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        length = len((error.details() or "").encode())
        return error.code().name if length <= MAX_ANSWER_BYTES else f"a message of {length} bytes"
    return "OK"


async def large_message(player: Player, field: str) -> str:
    return await status_of(player.clients.raw("Generate", message(field)))


async def many_choices(player: Player) -> str:
    """Send a request for many choices, which is cancelled at once, as 20 bytes can be."""
    request = pb.GenerateStreamRequest(sampling=pb.SamplingParams(n=MANY_CHOICES, temperature=1.0))
    request.token_ids.ids.extend([5] * 20)
    return await status_of(player.clients.raw("Generate", request.SerializeToString()))


async def spelled_key(player: Player) -> str:
    """Send a call of the same client, however its key is spelled."""
    value = f"{player.random.choice(SPELLINGS)} {player.target.hostile_key}"
    return await status_of(player.clients.raw("GetCapabilities", b"", (("authorization", value),)))


async def second_key(player: Player) -> str:
    value = f"Bearer {player.target.hostile_key}"
    metadata = (("authorization", value), ("authorization", f"junk {player.random.random()}"))
    return await status_of(player.clients.raw("GetCapabilities", b"", metadata))


async def stalled_uploads(player: Player) -> str:
    """Send one client's endless uploads, under each spelling of its key, while another client asks something."""

    async def upload() -> AsyncIterator[bytes]:
        head = pb.GenerateUploadStreamRequest(head=pb.GenerateStreamRequest(sampling=pb.SamplingParams(max_tokens=1)))
        yield head.SerializeToString()
        await asyncio.sleep(STALL_SECONDS)

    spelled = [f"{SPELLINGS[number % len(SPELLINGS)]} {player.target.hostile_key}" for number in range(STALLED)]
    calls = [player.clients.raw_upload(upload(), (("authorization", value),)) for value in spelled]
    try:
        await asyncio.sleep(STALL_SECONDS / 3)
        async with asyncio.timeout(OTHERS_SECONDS):
            await player.clients.grpc.capabilities()
    except TimeoutError:
        return f"another client got no answer within {OTHERS_SECONDS} s"
    finally:
        for call in calls:
            call.cancel()
    return "OK"


async def over_http(player: Player, path: str, body: dict[str, Any], key: bool = True) -> str:
    """Return the status of a request, or that its answer is long."""
    headers = {"authorization": f"Bearer {player.target.hostile_key}"} if key else {}
    url, method = f"http://{player.target.http}{path}", "GET" if path.endswith(".json") else "POST"
    async with player.clients.keyless.request(method, url, json=body, headers=headers) as found:
        length = len(await found.content.read(MAX_ANSWER_BYTES + 1))
        if found.status >= 400 and length > MAX_ANSWER_BYTES:
            return f"an answer of more than {MAX_ANSWER_BYTES} bytes"
        return f"HTTP {found.status}"


def completion(player: Player, **fields: Any) -> dict[str, Any]:
    return body_of(Case("", random_ids("hostile", 60), BLOCKS, max_tokens=1), player.model) | fields


async def large_body(player: Player, name: str) -> str:
    options = BLOCKS | {"star": "\x01" * 4_000_000} if name == "echo" else BLOCKS | {"star_segments": "a" * 2**22}
    return await over_http(player, "/v1/completions", completion(player, vllm_xargs=options))


async def bad_body(player: Player, fields: dict[str, Any]) -> str:
    return await over_http(player, "/v1/completions", completion(player, **fields))


async def without_key(player: Player, path: str) -> str:
    text = {"model": player.model, "prompt": "a", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    return await over_http(player, path, text | {"tokens": [5], "query": "a", "items": ["a"]}, key=False)


def deep(depth: int) -> Any:
    """Return a list in a list in a list."""
    return json.loads("[" * depth + "]" * depth)


INVALID, BAD = frozenset({"INVALID_ARGUMENT"}), frozenset({"HTTP 400"})
TWO_FORMS = {"allowed_token_ids": [5], "structured_outputs": {"choice": ["a"]}}
HOSTILE = [
    *(Hostile(f"8 MiB of {field}", partial(large_message, field=field), INVALID) for field in FIELDS),
    Hostile("n, gRPC", many_choices, INVALID),
    Hostile("a spelled key", spelled_key, frozenset({"OK"})),
    Hostile("a second key", second_key, frozenset({"UNAUTHENTICATED"})),
    Hostile("stalled uploads", stalled_uploads, frozenset({"OK"})),
    Hostile("n, HTTP", partial(bad_body, fields={"n": MANY_CHOICES, "temperature": 1}), BAD),
    Hostile("deep options", partial(bad_body, fields={"vllm_xargs": {"star": deep(900)}}), BAD),
    Hostile("KV transfer", partial(bad_body, fields={"vllm_xargs": {"kv_transfer_params": "x"}}), BAD),
    Hostile("two forms", partial(bad_body, fields=TWO_FORMS), BAD),
    Hostile("echo", partial(large_body, name="echo"), BAD),
    Hostile("segments", partial(large_body, name="segments"), BAD),
    *(Hostile(f"no key, {path}", partial(without_key, path=path), frozenset({"HTTP 401"})) for path in NO_KEY_PATHS),
]


async def hostile(player: Player, chosen: Hostile | None = None) -> str:
    """Make one attack by chance."""
    chosen = chosen or player.random.choice(HOSTILE)
    status = await chosen.attack(player)
    if status in FULL:
        return status
    if status in chosen.allowed:
        return ANSWERED if status == "OK" else REFUSED
    return f"{chosen.name}: {status}"
