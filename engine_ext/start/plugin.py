"""Entry point of vLLM into Starling (`vllm.general_plugins`): runs in every vLLM process, maybe twice.

It imports little, and never raises: vLLM builds its parser with plugins loaded, so an exception here would break every
`vllm` command.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import AsyncGenerator
from typing import Any

from starling.engine_ext.models.configs import register_model_families
from starling.vllm_compat.bench_commands import add_bench_backend, is_bench
from starling.vllm_compat.config import is_async_engine, on_engine_config, on_server_args
from starling.vllm_compat.core_process import divide_kv_memory_check
from starling.vllm_compat.front import (
    abort_unsent_requests,
    before_tokenizing,
    on_abort,
    on_beam_search,
    on_encode,
    on_error_text,
    on_generate,
    on_openai_request,
    on_processed_request,
    on_rendered_chat,
    on_request_output,
)
from starling.vllm_compat.versions import problem

logger = logging.getLogger("vllm.starling")


@functools.cache
def register() -> None:
    """Install the hooks into vLLM, or warn once and let any Starling option fail with the reason."""
    reason = problem()
    if reason is not None:
        logger.warning("Starling is installed but does nothing: %s", reason)
        _refuse_options(reason)
        return
    _hook_in()
    register_model_families()


def _hook_in() -> None:
    # Imports are made at the first call: each loads a part of vLLM that not every process needs.
    def before(engine_args: object) -> None:
        from starling.engine_ext.start.activation import before_engine_config

        before_engine_config(engine_args)

    def after(engine_args: object, vllm_config: object) -> None:
        from starling.engine_ext.front.call import note_engine_request
        from starling.engine_ext.front.front_state import state_of
        from starling.engine_ext.front.requests import plan_of_request
        from starling.engine_ext.start.activation import after_engine_config
        from starling.scheduler.planning.request_metadata import SOURCES

        def resolve(input_processor: Any, request: Any, prompt: Any) -> None:
            if request.sampling_params is not None:  # else a pooling request
                state_of(input_processor).planner.resolve(request, prompt)

        after_engine_config(vllm_config)
        on_processed_request(resolve)
        abort_unsent_requests()
        on_request_output(plan_of_request, SOURCES, note_engine_request)
        if is_async_engine(engine_args):  # each of several API servers passes here, in its own process
            _hook_into_front()

    def server_args(args: object) -> None:
        if not hasattr(args, "middleware"):  # `vllm bench`, `vllm run-batch`: no HTTP server
            return
        from starling.engine_ext.start.activation import prepare_server

        prepare_server(args)

    on_engine_config(before, after)
    if "vllm.v1.engine.core" in sys.modules:  # an engine core that was not forked from a front, or a front
        from starling.scheduler.planning.request_metadata import default_num_shards

        divide_kv_memory_check(default_num_shards)
    on_server_args(server_args)
    if is_bench(sys.argv):
        add_bench_backend("starling-grpc", _bench_request)


def _hook_into_front() -> None:
    """Install the hooks into the engine of a server, through which everything that its clients send passes."""
    from starling.engine_ext.front.bounds import bounded_text, constraint_error, shortened, with_reason
    from starling.engine_ext.front.call import current_call, sees_cached, with_sources, without_cached
    from starling.engine_ext.front.chat_segments import add_segments, generates, note_chat_options, wants_segments
    from starling.engine_ext.front.front_state import front_state, state_of
    from starling.engine_ext.front.look_up import look_up, prepare_look_up
    from starling.engine_ext.front.misplaced import explained
    from starling.engine_ext.front.observability import PromptSpan, traces
    from starling.engine_ext.front.requests import begin_beam_search, check_openai_request, check_unknown
    from starling.features.front_request import TRACE_HEADERS, FrontRequest
    from starling.scheduler.planning.decide import decision_of

    def with_salt(input_processor: Any, prompt: Any) -> Any:
        return state_of(input_processor).planner.with_salt(prompt)

    def generate_for_client(
        engine: Any, generate: Any, prompt: Any, params: Any, *request: Any
    ) -> AsyncGenerator[Any, None]:
        call = current_call.get()
        if call is not None and call.only_looks_up:
            return look_up(engine, prompt, request[0], request[-1], call)
        decision, (request_id, keywords) = decision_of(prompt), request
        planning, shown = (None, None) if decision is None else (decision.planning, decision.shown)
        span = None
        if traces(engine):
            span = PromptSpan(keywords.get(TRACE_HEADERS), planning)
            keywords = keywords | {TRACE_HEADERS: span.headers}
        state = front_state(engine)
        lora = state.planner.lora_of(None if decision is None else decision.plan, keywords.get("lora_request"))
        generated = state.outputs(FrontRequest(engine, generate, prompt, params, request_id, keywords, decision, lora))
        error = constraint_error(params)
        generated = generated if error is None else with_reason(generated, error)
        generated = with_sources(generated, shown) if sees_cached() else without_cached(generated)
        return generated if span is None else span.around(generated, shown or {})

    def openai_request(http_request: Any) -> None:
        if generates(http_request):
            check_openai_request(http_request)
        prepare_look_up(http_request)
        note_chat_options(http_request)

    def prepare(input_processor: Any, *request: Any, has_lora: bool) -> Any:
        return state_of(input_processor).planner.prepare(*request, has_lora=has_lora)

    on_generate(prepare, generate_for_client)
    on_encode(with_salt)
    on_abort(lambda engine, request_ids: front_state(engine).abort(request_ids))
    on_openai_request(openai_request, check_unknown)
    on_beam_search(begin_beam_search)
    on_error_text(explained, shortened)
    before_tokenizing(bounded_text)
    on_rendered_chat(wants_segments, add_segments)


async def _bench_request(*args: Any, **kwargs: Any) -> Any:
    from starling.engine_ext.serving.grpc.bench import request_starling

    return await request_starling(*args, **kwargs)


def _refuse_options(reason: str) -> None:
    """Let an engine that asks for Starling fail with the reason, if vLLM can be hooked at all."""

    def before(engine_args: object) -> None:
        if "starling" in (getattr(engine_args, "additional_config", None) or {}):
            raise ValueError(f"additional_config asks for Starling, but: {reason}")

    try:
        on_engine_config(before, lambda *_: None)
    except (ImportError, AttributeError):
        logger.warning("this vLLM has no engine configuration that Starling knows; its options are not read")
