"""The response of GetCapabilities."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from vllm import envs

from starling.engine_ext.front.state import front_state
from starling.engine_ext.serving.grpc.admin import star_message
from starling.v1 import inference_pb2 as pb
from starling.vllm_compat.versions import vllm_version

UNBOUNDED = 0  # gRPC limits only the messages that it receives


def capabilities(engine: Any, max_request_bytes: int, max_upload_bytes: int) -> pb.GetCapabilitiesResponse:
    """The response, from the engine's configuration; makes no call to the engine.

    Args:
        engine: the AsyncLLM of the server.
        max_request_bytes: the server's limit of a message.
        max_upload_bytes: the memory of prompts that are being uploaded.
    """
    model, state = engine.model_config, front_state(engine)
    planner = state.planner
    names = model.served_model_name
    return pb.GetCapabilitiesResponse(
        models=[names] if isinstance(names, str) else names,
        max_model_len=model.max_model_len,
        vocabulary_size=model.get_vocab_size(),
        kv_page_tokens=planner.page_size,
        star_available=not planner.facts.refusals,
        star_refusals=planner.facts.refusals,
        star_defaults=star_message(planner.defaults) if planner.config else None,
        max_request_bytes=max_request_bytes,
        max_response_bytes=UNBOUNDED,
        max_n=envs.VLLM_MAX_N_SEQUENCES,
        max_logprobs=model.max_logprobs,
        lora_names=sorted(state.lora_adapters()),
        starling_version=importlib.metadata.version("vllm-starling"),
        vllm_version=vllm_version(),
        max_upload_bytes=max_upload_bytes,
    )
