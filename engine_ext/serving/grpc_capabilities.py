"""What GetCapabilities says of a server."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from vllm import envs

from engine_ext import compat
from engine_ext.requests import star_requests
from engine_ext.serving.grpc_admin import star_message
from engine_ext.serving.grpc_upload import MAX_UPLOAD_BYTES
from starling.v1 import inference_pb2 as pb

UNBOUNDED = 0  # gRPC bounds what it receives only


def capabilities(engine: Any, max_request_bytes: int) -> pb.GetCapabilitiesResponse:
    """From the engine's configuration; nothing is asked of the engine itself."""
    model = engine.model_config
    star = star_requests(engine.input_processor)
    names = model.served_model_name
    return pb.GetCapabilitiesResponse(
        models=[names] if isinstance(names, str) else names,
        max_model_len=model.max_model_len,
        vocabulary_size=model.get_vocab_size(),
        kv_page_tokens=star.page,
        star_available=not star.refusals,
        star_refusals=star.refusals,
        star_defaults=star_message(star.config.star) if star.config else None,
        max_request_bytes=max_request_bytes,
        max_response_bytes=UNBOUNDED,
        max_n=envs.VLLM_MAX_N_SEQUENCES,
        max_logprobs=model.max_logprobs,
        lora_names=sorted(compat.lora_adapters(engine)),
        starling_version=importlib.metadata.version("vllm-starling"),
        vllm_version=compat.vllm_version(),
        max_upload_bytes=MAX_UPLOAD_BYTES,
    )
