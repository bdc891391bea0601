"""vLLM's configuration: hooks around its making, and what it does not say in public."""

from __future__ import annotations

import copy
from collections.abc import Callable, MutableMapping
from traceback import walk_tb
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from starling.vllm_compat.patching import Original, first_found, touches, wrap

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionCGSupport

CPU_PAGE_SIZE = 128
"""vLLM's default on CPU (vllm/platforms/cpu.py)."""
MEMORY_NODES_ENV = "CPU_VISIBLE_MEMORY_NODES"
"""The user's own choice of memory nodes (vllm/utils/cpu_resource_utils.py)."""


def on_engine_config(before: Callable[[Any], None], after: Callable[[Any, Any], None]) -> None:
    """Call ``before(engine_args)`` and ``after(engine_args, vllm_config)`` around every engine's configuration.

    `LLM(...)`, `vllm serve` and `vllm bench` all pass through EngineArgs.create_engine_config. Goes when a
    plugin can see the configuration before the engine is made.
    """
    from vllm.engine.arg_utils import EngineArgs

    @wrap(EngineArgs, "create_engine_config")
    def create_engine_config(original: Original, self: Any, *args: Any, **kwargs: Any) -> Any:
        before(self)
        config = original(self, *args, **kwargs)
        after(self, config)
        return config


def is_async_engine(engine_args: Any) -> bool:
    """Return whether these arguments are for an AsyncLLM, the engine of servers."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    return isinstance(engine_args, AsyncEngineArgs)


def on_server_args(callback: Callable[[Any], None]) -> None:
    """Call ``callback(namespace)`` before the OpenAI server makes its engine and app from it.

    Lets an activated plain `vllm serve` get our middleware without the user's --middleware. Goes when an
    endpoint plugin need not be named in VLLM_PLUGINS.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    @wrap(AsyncEngineArgs, "from_cli_args")
    def from_cli_args(original: Original, cls: type, args: Any) -> Any:
        callback(args)
        return original(cls, args)


@touches("vllm.config.parallel.ParallelConfig._api_process_count")
def num_api_servers(vllm_config: Any) -> int:
    """Return the number of API servers that send requests to the engines. Goes with a public field."""
    return vllm_config.parallel_config._api_process_count


def cpu_attention_isa(vllm_config: Any) -> str:
    """Return the instruction set for which vLLM's CPU backend lays out its pages, known before a layer is made.

    Goes when a backend names its layout.
    """
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    model, cache = vllm_config.model_config, vllm_config.cache_config
    return _get_attn_isa(model.dtype, cache.block_size, model.get_head_size(), cache.cache_dtype)


@touches("vllm.v1.attention.backends.cpu_attn.CPUAttentionMetadataBuilder.{isa, _set_isa_to_layers}")
def set_cpu_attention_isa(builder: Any, layer_names: list[str], isa: str) -> None:
    """Let vLLM's CPU backend lay out the pages of a builder's layers for another instruction set, before any is used.

    Goes when vLLM has an option for it.
    """
    builder.isa = isa
    builder._set_isa_to_layers(layer_names)


@touches("vllm.model_executor.layers.attention.attention.set_default_quant_scales")
def kv_scales(layer: Any) -> dict[str, float]:
    """Return the scales of a layer's quantised KV cache. Goes with public attributes."""
    return {"k_scale": layer._k_scale_float, "v_scale": layer._v_scale_float}


@touches("vllm.config.compilation.CompilationConfig.static_forward_context")
def page_layout(vllm_config: Any, layer: str, cache_dtype: str) -> str:
    """Return a description of how a layer's KV pages are laid out inside.

    It names the backend, on CPU the instruction set that the backend packs pages for, the dtype, and the order of
    dimensions that the engine core has chosen for all layers (vllm/v1/kv_cache_layout.py). Pages are copied as they are
    between equal layouts only. Goes when a backend names its layout.
    """
    attention = vllm_config.compilation_config.static_forward_context[layer]
    name = attention.get_attn_backend().get_name()
    order = vllm_config.cache_config.get_resolved_kv_cache_layout().name
    return "/".join([name, str(getattr(attention, "isa", "any")), cache_dtype, order])


@touches("vllm.config.compilation.CompilationConfig.static_forward_context")
def attention_layer(vllm_config: Any, name: str) -> Any:
    """Return a model's layer that has a KV cache, by its name. Goes when there is a public way to layers."""
    return vllm_config.compilation_config.static_forward_context[name]


@touches("vllm.config.compilation.CompilationConfig.splitting_ops")
def split_graph_at(vllm_config: Any, op: str) -> None:
    """Let piecewise CUDA graphs leave out an op that reads the step's metadata, like vLLM's attention ops.

    Where vLLM splits nothing (eager, or full graphs only) there is nothing to add. Goes when an op can ask for it.
    """
    ops = vllm_config.compilation_config.splitting_ops
    if ops and op not in ops:
        ops.append(op)


def kv_cache_capacity(vllm_config: Any, specs: dict[str, Any], available_bytes: int) -> int:
    """Return the tokens that an engine would report as its "KV cache size", from its layers' specs; starts none.

    The number of requests of max_model_len that fit at once, times max_model_len. vLLM's own functions divide the
    bytes among groups, round to pages and reserve pages for tokens in flight. Goes when vLLM can say it without a
    model runner.

    Args:
        specs: layer name -> its KV cache spec, on one rank.
        available_bytes: bytes of that rank for the KV cache.

    Raises:
        ValueError: not even one such request fits.
    """
    from vllm.v1.core import kv_cache_utils as utils

    cache = vllm_config.cache_config
    cache.kv_cache_layout = cache.kv_cache_layout or "LBHNC"  # an engine's workers choose; no bytes depend on it
    planning = first_found("vllm.v1.core.kv_cache_planning", "vllm.v1.core.kv_cache_utils")
    groups = []
    if hasattr(planning, "get_global_kv_cache_groups"):  # since vLLM 0.33 the caller makes the groups
        groups.append(planning.get_global_kv_cache_groups(vllm_config, [specs]))
    configs = planning.get_kv_cache_configs(vllm_config, [specs], [available_bytes], *groups)
    return utils.get_kv_cache_capacity(vllm_config, utils.generate_scheduler_kv_cache_config(configs))[0]


@touches("vllm.config.compilation.CompilationConfig.{cudagraph_mode, resolve_cudagraph_mode_and_sizes}")
def resolved_graph_mode(vllm_config: Any, support: AttentionCGSupport) -> str:
    """Return the name of the CUDA graph mode that an engine will have. Goes when vLLM says it before a model is loaded.

    Args:
        support: CUDA graph support that all attention layers have.

    Raises:
        ValueError: vLLM does not start with this mode and such layers.
    """
    compilation = copy.deepcopy(vllm_config.compilation_config)
    queries = 1 + vllm_config.num_speculative_tokens
    is_v2 = getattr(vllm_config, "use_v2_model_runner", None)
    options = {} if is_v2 is None else {"use_v2_model_runner": is_v2}
    return compilation.resolve_cudagraph_mode_and_sizes(support, None, queries, **options).name


@touches("vllm.config.cache.CacheConfig.DEFAULT_GPU_MEMORY_UTILIZATION", since="0.34")
def default_memory_share() -> float:
    """Return the share of memory that vLLM takes where it sizes the KV cache by an estimate, and the user says none.

    Since vLLM 0.34 the option's default is None: on a GPU the KV cache takes all memory that the warm-up leaves free.
    """
    from vllm.config import CacheConfig
    from vllm.engine.arg_utils import EngineArgs

    share = getattr(CacheConfig, "DEFAULT_GPU_MEMORY_UTILIZATION", EngineArgs.gpu_memory_utilization)
    assert share is not None
    return share


@touches("vllm.config.vllm.VllmConfig.use_v2_model_runner", before="0.34")
def model_runner(vllm_config: Any) -> str:
    """Return which of vLLM's model runners an engine has, "V1" or "V2"; since vLLM 0.34 there is V2 alone."""
    return "V2" if getattr(vllm_config, "use_v2_model_runner", True) else "V1"


@touches("vllm.config.cache.CacheConfig.user_specified_block_size")
def page_size_before_start(vllm_config: Any) -> int:
    """Return the tokens of a KV page, as far as it is known before the engine cores have started.

    On CPU, vLLM 0.33 chooses the page size in the worker, when the model is loaded. Until then the configuration has
    the default of GPUs, where no user gave a size. Goes when the configuration has the size that will be used.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    cache = vllm_config.cache_config
    started = cache.num_gpu_blocks is not None
    if started or cache.user_specified_block_size or vllm_config.device_config.device_type != "cpu":
        return cache.block_size
    return AttentionBackendEnum.CPU_ATTN.get_class().get_preferred_block_size(CPU_PAGE_SIZE)


@touches("vllm.platforms.interface.Platform._align_hybrid_block_size")
def hybrid_page_size(vllm_config: Any) -> int:
    """Return the tokens of a full-attention page of a hybrid model before its engine cores have started.

    vLLM enlarges the page when it loads the model, until it takes as much memory as a state. For the backends that
    Starling wraps, the result does not depend on which one runs, but for a few GPUs that need large pages. Goes when
    the configuration has the size that will be used.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    config = copy.copy(vllm_config)
    config.cache_config = copy.copy(vllm_config.cache_config)
    config.cache_config.block_size = page_size_before_start(vllm_config)
    on_cpu = vllm_config.device_config.device_type == "cpu"
    backend = AttentionBackendEnum.CPU_ATTN if on_cpu else AttentionBackendEnum.FLASH_ATTN
    current_platform._align_hybrid_block_size(config, backend.get_class())
    return config.cache_config.block_size


def share_memory_nodes(vllm_config: Any, environ: MutableMapping[str, str]) -> None:
    """Let the CPU replicas of a host use all of its memory nodes, where it has fewer nodes than workers.

    vLLM 0.33 takes a worker's number for that of a memory node, and ends a replica whose node does not exist, on every
    host of one node. It leaves that out wherever VLLM_CPU_SIM_MULTI_NUMA is set; 0, its default, changes nothing else.
    Called before the engine cores start, which inherit the environment. Goes when `vllm serve --data-parallel-size 2`
    starts on a host of one memory node.
    """
    parallel = vllm_config.parallel_config
    workers = parallel.data_parallel_size_local * parallel.world_size
    if vllm_config.device_config.device_type != "cpu" or parallel.data_parallel_size == 1:
        return
    if not environ.get(MEMORY_NODES_ENV) and not set(range(workers)) <= memory_nodes():
        environ.setdefault("VLLM_CPU_SIM_MULTI_NUMA", "0")


def memory_nodes() -> set[int]:
    """Return the memory nodes that this process may use."""
    from vllm.utils.cpu_resource_utils import get_memory_affinity

    return set(get_memory_affinity())


def move_option(parser: Any, dest: str, group: Any, help_text: str) -> None:
    """Show an option of vLLM's parser in another group, with another help. Goes when argparse has a public way.

    Args:
        parser: a FlexibleArgumentParser.
        dest: the option's name in the parsed namespace.
        group: a group of the same parser.
    """
    for other in parser._action_groups:
        for action in [action for action in other._group_actions if action.dest == dest]:
            other._group_actions.remove(action)
            group._group_actions.append(action)
            action.help = help_text


def is_of_configuration(error: BaseException) -> bool:
    """Return whether vLLM raised an error about the model or the options, before it made an engine.

    That is where it makes an engine's configuration, or where its launcher itself refuses options that exclude one
    another. Goes when vLLM has a class for such errors.
    """
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    of_launcher = bool(frames) and frames[-1].f_globals.get("__name__") == "vllm.entrypoints.cli.serve"
    return of_launcher or any(frame.f_code.co_name == "create_engine_config" for frame in frames)


def plain_message(error: Exception) -> str:
    """Return the message of an error of vLLM's configuration, also where vLLM checks its options with pydantic."""
    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(each["msg"].removeprefix("Value error, ").strip() for each in error.errors())
