"""Clients that stream as many tokens as they are told, over HTTP and over gRPC, and say how long it took."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator

import aiohttp
import grpc

from starling.v1 import inference_pb2 as pb
from starling.v1 import inference_pb2_grpc

PROMPT = "a prompt of some forty characters, so. "


async def over_grpc(address: str, streams: int, tokens: int, model: str) -> list[int]:
    """Tokens of each stream, counted one by one as they come."""
    sampling = pb.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)

        async def one() -> int:
            count = 0
            async for event in stub.GenerateStream(pb.GenerateStreamRequest(text=PROMPT, sampling=sampling)):
                count += len(event.delta.token_ids)
            return count

        return await asyncio.gather(*(one() for _ in range(streams)))


async def over_http(address: str, streams: int, tokens: int, model: str) -> list[int]:
    """The same from the OpenAI server's completions, as its clients read them: each event's JSON is parsed."""
    body = {"model": model, "prompt": PROMPT, "temperature": 0, "max_tokens": tokens, "ignore_eos": True}
    body |= {"stream": True, "return_token_ids": True}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one() -> int:
            count = 0
            async with session.post(f"{address}/v1/completions", json=body) as response:
                async for data in events(response.content):
                    count += len(data["choices"][0]["token_ids"] or ())
            return count

        return await asyncio.gather(*(one() for _ in range(streams)))


async def events(lines: AsyncIterator[bytes]) -> AsyncIterator[dict]:
    async for line in lines:
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


CLIENTS = {"gRPC": over_grpc, "HTTP": over_http}


def stream(kind: str, address: str, streams: int, tokens: int, model: str) -> float:
    """Seconds until ``streams`` streams at once have given ``tokens`` tokens each; for a process of its own.

    Raises:
        RuntimeError: a stream ended short.
    """
    started = time.perf_counter()
    counts = asyncio.run(CLIENTS[kind](address, streams, tokens, model))
    seconds = time.perf_counter() - started
    if counts != [tokens] * streams:
        raise RuntimeError(f"{kind}: streams of {counts} tokens, asked for {tokens} each")
    return seconds
