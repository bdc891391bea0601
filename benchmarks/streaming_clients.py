"""Clients of gRPC and HTTP that stream a given number of tokens and measure the time."""

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


async def stream_grpc(address: str, streams: int, tokens: int, model: str) -> list[int]:
    """Return the number of tokens of each stream, counted event by event."""
    sampling = pb.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)

        async def count_tokens() -> int:
            count = 0
            async for event in stub.GenerateStream(pb.GenerateStreamRequest(text=PROMPT, sampling=sampling)):
                count += len(event.delta.token_ids)
            return count

        return await asyncio.gather(*(count_tokens() for _ in range(streams)))


async def stream_http(address: str, streams: int, tokens: int, model: str) -> list[int]:
    """Return the same as ``stream_grpc``, over completions of the OpenAI server.

    Parses the JSON of each event, as its clients do.
    """
    body = {"model": model, "prompt": PROMPT, "temperature": 0, "max_tokens": tokens, "ignore_eos": True}
    body |= {"stream": True, "return_token_ids": True}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def count_tokens() -> int:
            count = 0
            async with session.post(f"{address}/v1/completions", json=body) as response:
                async for data in events(response.content):
                    count += len(data["choices"][0]["token_ids"] or ())
            return count

        return await asyncio.gather(*(count_tokens() for _ in range(streams)))


async def events(lines: AsyncIterator[bytes]) -> AsyncIterator[dict]:
    """Yield the JSON of each server-sent event."""
    async for line in lines:
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


CLIENTS = {"gRPC": stream_grpc, "HTTP": stream_http}


def time_streams(protocol: str, address: str, streams: int, tokens: int, model: str) -> float:
    """Measure the seconds until ``streams`` concurrent streams have returned ``tokens`` tokens each.

    Runs in its own process.

    Raises:
        RuntimeError: a stream ended early.
    """
    started = time.perf_counter()
    counts = asyncio.run(CLIENTS[protocol](address, streams, tokens, model))
    seconds = time.perf_counter() - started
    if counts != [tokens] * streams:
        raise RuntimeError(f"{protocol}: the streams have {counts} tokens, expected {tokens} each")
    return seconds
