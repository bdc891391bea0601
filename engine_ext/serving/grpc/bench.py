"""Backend `starling-grpc` of `vllm bench serve`: sends the benchmark's requests over gRPC, timed as over HTTP."""

from __future__ import annotations

import os
import time
import traceback
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

import grpc
from google.protobuf import json_format
from vllm.benchmarks.lib.endpoint_request_func import RequestFuncInput, RequestFuncOutput

from starling.client.requests import set_star
from starling.config.parsing import plain
from starling.config.star import FIELD_OF
from starling.v1 import inference_pb2 as pb
from starling.v1 import inference_pb2_grpc

BACKEND = "starling-grpc"
REQUEST_FIELDS = ("priority", "cache_salt")
NO_TOKEN = "the stream ended without a token"
MAX_EVENT_BYTES = 64 * 2**20
"""Largest size of an event, compressed and decompressed. Events that were not read in time are merged into one."""
MAX_MESSAGE = 4096  # characters of an error

# One connection for each benchmark: vLLM makes one HTTP session and passes it to every request.
_channels: WeakKeyDictionary[Any, grpc.aio.Channel] = WeakKeyDictionary()


def channel_of(session: Any, api_url: str) -> grpc.aio.Channel:
    """Return the benchmark's channel to the host and port of its --base-url or --host and --port; TLS for https.

    Args:
        session: vLLM's HTTP session, one for each benchmark.
        api_url: URL of the server's endpoint.
    """
    if session not in _channels:
        url = urlsplit(api_url)
        options = [("grpc.max_receive_message_length", MAX_EVENT_BYTES)]
        if url.scheme == "https":
            _channels[session] = grpc.aio.secure_channel(url.netloc, grpc.ssl_channel_credentials(), options)
        else:
            _channels[session] = grpc.aio.insecure_channel(url.netloc, options)
    return _channels[session]


def request_of(func_input: RequestFuncInput) -> pb.GenerateStreamRequest:
    """Return the request that the HTTP backend `vllm` would send.

    --extra-body has sampling parameters, star options and REQUEST_FIELDS by name.

    Raises:
        ValueError: the request has something that this backend does not send.
    """
    if func_input.multi_modal_content:
        raise ValueError(f"{BACKEND} sends text only")
    sampling: dict[str, Any] = {"max_tokens": func_input.output_len, "repetition_penalty": 1.0}
    if func_input.logprobs is not None:
        sampling["logprobs"] = func_input.logprobs
    if func_input.ignore_eos:
        sampling["ignore_eos"] = True
    star: dict[str, Any] = {}
    fields: dict[str, Any] = {"request_id": func_input.request_id} if func_input.request_id else {}
    extra = dict(func_input.extra_body or {})
    xargs = extra.pop("vllm_xargs", {})  # where the HTTP backend has star options
    for name, value in (extra | xargs).items():
        if name in FIELD_OF:
            star[name] = value
        elif name in REQUEST_FIELDS:
            fields[name] = value
        else:
            sampling[name] = value
    fields |= {"sampling": sampling}
    prompt: Any = func_input.chat_messages or func_input.prompt
    if isinstance(prompt, str):
        fields["text"] = prompt
    elif all(isinstance(part, int) for part in prompt):
        fields["token_ids"] = {"ids": prompt}
    elif all(isinstance(part, dict) and isinstance(part.get("content"), str) for part in prompt):
        fields["chat"] = {"messages": [{name: part[name] for name in ("role", "content")} for part in prompt]}
    else:
        raise ValueError(f"{BACKEND} sends one prompt a request, as text, token ids or messages of text")
    try:
        request = json_format.ParseDict(fields, pb.GenerateStreamRequest())
        if star:
            set_star(request.star, star)
        return request
    except (json_format.ParseError, TypeError, ValueError) as error:
        raise ValueError(f"--extra-body: {error}") from None


def metadata_of(func_input: RequestFuncInput) -> tuple[tuple[str, str], ...]:
    """Return the metadata of a call: the headers of --header, and the API key of OPENAI_API_KEY."""
    key = os.environ.get("OPENAI_API_KEY")
    headers = ({"authorization": f"Bearer {key}"} if key else {}) | (func_input.extra_headers or {})
    return tuple((name.lower(), value) for name, value in headers.items())


async def request_starling(
    request_func_input: RequestFuncInput, session: Any, pbar: Any | None = None
) -> RequestFuncOutput:
    """Send one request, as a RequestFunc of vLLM. It never raises: ``error`` says why a request failed.

    The times are those of deltas, as the HTTP backend's are those of chunks.
    """
    output = RequestFuncOutput(prompt_len=request_func_input.prompt_len)
    text: list[str] = []
    output.start_time = latest = time.perf_counter()
    try:
        request = request_of(request_func_input)
        stub = inference_pb2_grpc.InferenceServiceStub(channel_of(session, request_func_input.api_url))
        output.start_time = latest = time.perf_counter()
        async for event in stub.GenerateStream(request, metadata=metadata_of(request_func_input)):
            kind = event.WhichOneof("event")
            if kind == "delta":
                now = time.perf_counter()
                if output.ttft:
                    output.itl.append(now - latest)
                else:
                    output.ttft = now - output.start_time
                latest = now
                text.append(event.delta.text)
            elif kind == "final":
                output.output_tokens += event.final.usage.completion_tokens
                output.prompt_len = event.final.usage.prompt_tokens or output.prompt_len
        output.success = bool(output.ttft)
        output.error = "" if output.success else NO_TOKEN
    except grpc.aio.AioRpcError as error:
        output.error = plain(f"{error.code().name}: {error.details()}"[:MAX_MESSAGE])
    except Exception:
        output.error = traceback.format_exc()
    output.generated_text = "".join(text)
    output.latency = latest - output.start_time
    if pbar:
        pbar.update(1)
    return output
