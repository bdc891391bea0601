"""What Star Attention does not run with, and what keeps a prompt on one replica, each with the reason."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

from vllm import envs
from vllm.config import CUDAGraphMode
from vllm.v1.kv_cache_interface import KVCacheSpecKind

from starling.attention_backends.kernels.contract import AMX, CPU_ISAS
from starling.attention_backends.kernels.cpu.attention import VECTOR_SIZE
from starling.attention_backends.paged.names import CLASSES, NAME
from starling.attention_backends.star.backend import WRAPPED
from starling.config.entry import StarlingConfig, config_of
from starling.engine_ext.adapter import adapter_of
from starling.engine_ext.engine_report import BLOCK_POSITIONS, HEADS, HEADS_ORDER, SPLIT, STAR
from starling.engine_ext.head_scores import scores_of
from starling.replicas.messages import nixl_problem
from starling.scheduler.star.facts import EngineFacts, ReplicaSet
from starling.scheduler.star.independence import FULL_ATTENTION, HYBRID, dependence
from starling.scheduler.star.request_metadata import LIBRARY_CONNECTORS, OWN_CONNECTORS, default_num_shards
from starling.vllm_compat.config import cpu_attention_isa, num_api_servers, page_size_before_start
from starling.vllm_compat.engine_report import engine_reports

MAX_SERVERS = 64
"""Over how many servers a prompt may be split, this one included."""

# Connectors whose keys are request.block_hashes, and so tell star pages from dense ones.
CONNECTORS = (*OWN_CONNECTORS, "OffloadingConnector")

SPECULATION = ("ngram", "suffix", "draft_model", "eagle", "eagle3", "mtp")
"""The methods of speculative decoding whose drafts come from tokens, or from layers with full attention."""


def _full_attention_layers(model: Any) -> bool:
    """Whether the text model has a full-attention layer, as far as its configuration says."""
    if model.is_attention_free:
        return False
    layer_types = getattr(model.hf_text_config, "layer_types", None)
    if layer_types:
        return any(kind in (*FULL_ATTENTION, HYBRID) for kind in layer_types)
    return model.get_sliding_window() is None


def _connector(config: Any) -> str | None:
    transfer = config.kv_transfer_config
    return None if transfer is None or transfer.kv_connector in CONNECTORS else transfer.kv_connector


def _other_speculation(config: Any) -> str | None:
    speculative = config.speculative_config
    return None if speculative is None or speculative.method in SPECULATION else speculative.method


def _backend(config: Any) -> str | None:
    given = config.attention_config
    backend = given.backend_per_kind.get(KVCacheSpecKind.FULL_ATTENTION.value, given.backend)
    on_cpu = config.device_config.device_type == "cpu"  # the CPU platform always takes CPU_ATTN
    if backend is None or on_cpu or backend.name in WRAPPED:
        return None
    is_own = backend.name == NAME and _options(config).gpu_attention in CLASSES
    return None if is_own else backend.name


def _reported(field: str) -> Callable[[Any], str | None]:
    """What engine cores that have started report of themselves; see engine_report.py."""

    def found(config: Any) -> str | None:
        reported = {report[field] for report in engine_reports(config)} - {None}
        return "; ".join(sorted(reported)) or None

    return found


Rules = tuple[tuple[Callable[[Any], Any], str], ...]

RULES: Rules = (
    (lambda c: c.model_config.runner_type != "generate", "the model does not generate, so there is no prefill to cut"),
    (lambda c: c.model_config.is_encoder_decoder, "encoder-decoder models: the prompt is not one causal sequence"),
    (lambda c: c.model_config.use_mla, "MLA models: their latent cache has backends of its own, not wrapped yet"),
    (lambda c: not _full_attention_layers(c.model_config), "the model has no full-attention layer"),
    (lambda c: c.model_config.uses_alibi, "ALiBi: a key's distance is lost when its page moves in the block table"),
    (lambda c: c.model_config.is_mm_prefix_lm, "prefix-LM multi-modal models attend both ways over image tokens"),
    (lambda c: c.model_config.rswa_window is not None, "R-SWA models keep a prefix length per batch row"),
    (lambda c: c.model_config.is_diffusion, "diffusion models decode whole canvases, not token by token"),
    (_other_speculation, f"speculative decoding by another method than {', '.join(SPECULATION)}"),
    (
        lambda c: c.speculative_config and c.speculative_config.enable_adaptive_verification,
        "adaptive verification takes drafts out of a step, so that batch rows are not those of the scheduler",
    ),
    (
        lambda c: c.speculative_config and c.model_config.is_hybrid,
        "speculative decoding: a hybrid model keeps a recurrent state for each draft token",
    ),
    (lambda c: c.parallel_config.decode_context_parallel_size > 1, "decode context parallelism shards the pages"),
    (lambda c: c.parallel_config.prefill_context_parallel_size > 1, "prefill context parallelism splits the prompt"),
    (
        lambda c: c.parallel_config.use_ubatching,
        "dual-batch overlap and --ubatch-size slice batches by row before rows are split",
    ),
    (
        lambda c: c.cache_config.use_replayssm,
        "--use-replayssm: its positions in the Mamba state are per batch row, and have no split into star rows",
    ),
    (lambda c: c.cache_config.kv_sharing_fast_prefill, "KV-sharing fast prefill skips tokens by batch row"),
    (
        lambda c: (
            c.compilation_config.cudagraph_mode.has_full_cudagraphs()
            and c.scheduler_config.long_prefill_token_threshold == 1
        ),
        "long_prefill_token_threshold=1 with full decode graphs leaves star prompts no chunk to run in",
    ),
    (_connector, "the KV connector is not known to key pages by request.block_hashes, so star and dense would mix"),
    (_backend, f"the attention backend is not one of those wrapped: {', '.join(WRAPPED)}"),
    (_reported(STAR), "the engine can't run it, as it found when it started"),
)


def _other_connector(config: Any) -> str | None:
    transfer = config.kv_transfer_config
    return None if transfer is None or transfer.kv_connector in OWN_CONNECTORS else transfer.kv_connector


def _options(config: Any) -> StarlingConfig:
    return config_of(config) or StarlingConfig()


def has_peers(config: Any) -> bool:
    """Whether prompts are split over servers that find one another (--star-replica-peers)."""
    return bool(_options(config).replicas.peers)


def has_library(config: Any) -> bool:
    """Whether pages go to host memory or beyond it, so that others may find them (--star-library)."""
    transfer = config.kv_transfer_config
    return transfer is not None and transfer.kv_connector in LIBRARY_CONNECTORS


def _engines_with_peers(config: Any) -> str | None:
    if not has_peers(config) or config.parallel_config.data_parallel_size == 1:
        return None
    return f"--data-parallel-size {config.parallel_config.data_parallel_size}"


def _moves_kv_memory(config: Any) -> bool:
    """As vLLM's own check of KV connectors; it runs before Starling sets its connector."""
    settings = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "") + os.environ.get("PYTORCH_ALLOC_CONF", "")
    on_cpu = config.device_config.device_type == "cpu"
    return "expandable_segments:True" in settings and not config.model_config.enable_cumem_allocator and not on_cpu


def other_launcher(parallel: Any) -> str | None:
    """What starts the engines' processes, if it is not vLLM itself: it may do so on other hosts."""
    if parallel.data_parallel_backend != "mp":
        return parallel.data_parallel_backend
    executor = parallel.distributed_executor_backend
    return None if executor in ("mp", "uni") else str(executor)


SPLIT_RULES: Rules = (
    (lambda c: dependence(c.model_config), "the model's star blocks depend on one another"),
    (
        lambda c: not c.cache_config.enable_prefix_caching,
        "replicas exchange pages of their prefix caches, which are off",
    ),
    (_other_connector, "an engine has one KV connector, and --kv-transfer-config gives it another"),
    (_engines_with_peers, "a server with peers (--star-replica-peers) has one engine"),
    (
        lambda c: c.parallel_config.data_parallel_external_lb or c.parallel_config.data_parallel_hybrid_lb,
        "with an external load balancer a front reaches some of the replicas only",
    ),
    (
        lambda c: envs.VLLM_DP_SIZE > 1,
        "VLLM_DP_SIZE: each process of vLLM's offline data parallelism reaches its own replica only",
    ),
    (
        lambda c: other_launcher(c.parallel_config),
        "replicas that vLLM does not start itself may be on hosts whose network devices are not known",
    ),
    (lambda c: c.parallel_config.pipeline_parallel_size > 1, "pipeline parallelism divides the layers of a page"),
    (lambda c: c.parallel_config.enable_elastic_ep, "elastic expert parallelism changes the replicas while it runs"),
    (
        lambda c: c.parallel_config.enable_fault_tolerance,
        "--enable-fault-tolerance ends an engine's requests and goes on with it: what others hold is not known",
    ),
    (lambda c: c.speculative_config, "speculative decoding: the KV of a part's last token depends on the next part"),
    (lambda c: c.model_config.enable_sleep_mode, "sleep mode frees the KV memory that NIXL has registered"),
    (
        _moves_kv_memory,
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True may move the KV memory that NIXL has registered",
    ),
    (lambda c: c.aux_output_config.enabled, "outputs beside tokens exist on the replica that computed them only"),
    (_reported(SPLIT), "replicas exchange the pages of one group of layers, and the engine has other ones"),
    (lambda c: nixl_problem(), "the NIXL library, which moves KV pages, can't be imported: pip install nixl==1.5.1"),
)


def reads_all_caches(config: Any) -> bool:
    """Whether Starling's CPU attention has to read the cache of each full-attention layer, by the server's options."""
    star = _options(config).star
    return has_documents(config) or star.shards == "on"


def has_documents(config: Any) -> bool:
    """Whether the server's options say where documents start, so that its engine is made for them."""
    return _options(config).star.segments not in (None, "off")


def is_made_for_documents(config: Any) -> bool:
    """Whether the engine is made for documents: the server's options say where they start, and nothing refuses them."""
    return has_documents(config) and not document_refusals(config)


def has_dense_heads(config: Any) -> bool:
    """Whether the server's options say that some heads see everything, so that its engine is made for them.

    A file of scores says so by itself, unless the server's share is 0.
    """
    options = _options(config)
    share = options.star.dense_heads
    return options.star_heads is not None if share is None else share > 0


def unread_isa(config: Any) -> str | None:
    """The instruction set for which vLLM lays out keys, where Starling's CPU attention does not read them."""
    isa = cpu_attention_isa(config)
    if isa in CPU_ISAS or (isa == AMX and reads_all_caches(config)):
        return None
    return isa


# Where Starling's CPU attention, which returns its log-sum-exp, does not run.
CPU_ATTENTION_RULES: Rules = (
    (lambda c: _options(c).cpu_attention == "vllm", "cpu_attention=vllm: vLLM's CPU attention gives no log-sum-exp"),
    (
        lambda c: c.model_config.get_head_size() % VECTOR_SIZE,
        f"Starling's CPU attention takes head sizes that are multiples of {VECTOR_SIZE}",
    ),
    (
        unread_isa,
        "on this processor vLLM stores keys in an order that Starling's CPU attention does not read, unless the server "
        "is started with --star-segments or --star-shards on, or with --dtype float32",
    ),
)

SHARD_RULES: Rules = (
    (
        has_peers,
        "servers that are peers (--star-replica-peers) don't know how much of its KV memory another one has promised",
    ),
    (has_library, "a library may keep what is computed in a step in which a replica with other KV is lost"),
    (lambda c: c.device_config.device_type != "cpu", "attention that returns its log-sum-exp is available on CPU only"),
    (
        lambda c: c.cache_config.cache_dtype.startswith("fp8"),
        "replicas exchange queries in the dtype of the KV cache, which for fp8 would round them",
    ),
    *CPU_ATTENTION_RULES,
    (
        lambda c: num_api_servers(c) > 1,
        "each of several API servers (--api-server-count) would reserve the same KV memory for its prompts",
    ),
    (
        lambda c: c.scheduler_config.async_scheduling,
        "async scheduling: a step begins before it is known whether all replicas answered in the last one",
    ),
)


def _has_breakable_graphs(config: Any) -> bool:
    has_graphs = config.compilation_config.cudagraph_mode not in (None, CUDAGraphMode.NONE)
    return has_graphs and config.device_config.device_type != "cpu" and envs.VLLM_USE_BREAKABLE_CUDAGRAPH


def _on_cpu(rule: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda config: config.device_config.device_type == "cpu" and rule(config)


DOCUMENT_RULES: Rules = (
    (
        lambda c: c.device_config.device_type not in ("cpu", "cuda") and c.device_config.device_type,
        "the kernels run on CPUs and on CUDA devices",
    ),
    (
        lambda c: c.device_config.device_type != "cpu" and not has_documents(c),
        "on a GPU the server has to be started with --star-segments, so that its layers and graphs are made for them",
    ),
    (
        _has_breakable_graphs,
        "breakable CUDA graphs are on (VLLM_USE_BREAKABLE_CUDAGRAPH, VLLM_BATCH_INVARIANT), and documents have not "
        "been tested with them",
    ),
    (lambda c: dependence(c.model_config), "the model's star blocks depend on one another"),
    (lambda c: c.speculative_config, "speculative decoding: drafters take the positions of the prompt"),
    (lambda c: c.model_config.uses_mrope, "M-RoPE: an image's positions depend on the images before it"),
    (
        lambda c: any(not rotary for rotary in getattr(c.model_config.hf_text_config, "no_rope_layers", None) or ()),
        "some layers have no rotary embedding, so that turning a query would change their scores",
    ),
    (
        lambda c: c.device_config.device_type != "cpu" and c.cache_config.cache_dtype.startswith("fp8"),
        "on a GPU the KV cache is fp8, and so may be its queries",
    ),
    *((_on_cpu(rule), reason) for rule, reason in CPU_ATTENTION_RULES),
    (_reported(BLOCK_POSITIONS), "the engine can't run it, as it found when it started"),
)


def _workers_have_other_scores(config: Any) -> bool:
    """Whether the file of scores has changed between the starts of the workers and of this front."""
    reported = {report.get(HEADS_ORDER) for report in engine_reports(config)} - {None}
    scores = scores_of(config) if reported else None
    return scores is not None and reported != {scores.order_digest}


HEAD_RULES: Rules = (
    (lambda c: is_attamba(c), "an Attamba model's layers attend by themselves"),
    (
        lambda c: c.device_config.device_type not in ("cpu", "cuda") and c.device_config.device_type,
        "heads of one layer that see different keys run on CPUs and on CUDA devices",
    ),
    (
        lambda c: c.device_config.device_type != "cpu" and not has_dense_heads(c),
        "on a GPU the server has to be started with --star-heads or --star-dense-heads, since its layers are then made "
        "to attend in several calls",
    ),
    (
        lambda c: c.device_config.device_type != "cpu" and has_documents(c),
        "on a GPU the server is started with --star-segments, and its layers are made for documents",
    ),
    (_reported(HEADS), "the engine can't run it, as it found when it started"),
    (
        _workers_have_other_scores,
        "the engine has other scores of the heads than this process, as their file changed between their starts: start "
        "the server anew",
    ),
)


def heads_refusals(vllm_config: Any) -> list[str]:
    """The reasons why some heads can't see everything while the others see star blocks; empty where they can."""
    return list(_refusals(HEAD_RULES, vllm_config))


def document_refusals(vllm_config: Any) -> list[str]:
    """The reasons why blocks can't have positions of their own on this engine; empty where they can."""
    return list(_refusals(DOCUMENT_RULES, vllm_config))


def replica_set(vllm_config: Any) -> ReplicaSet:
    """The server's replicas, and why a prompt can't be split over them, or its KV can't stay there."""
    peers = has_peers(vllm_config)
    size = MAX_SERVERS if peers else vllm_config.parallel_config.data_parallel_size
    refusals = list(_refusals(RULES + SPLIT_RULES, vllm_config)) if size > 1 else []
    shards_refusal = None if size == 1 or refusals else next(_refusals(SHARD_RULES, vllm_config), None)
    return ReplicaSet(size, "; ".join(refusals) or None, shards_refusal, 1 if peers else None)


def star_refusals(vllm_config: Any) -> list[str]:
    """The reasons why Star Attention can't run on this engine; empty where it can."""
    return list(_refusals(RULES, vllm_config))


def _refusals(rules: Rules, vllm_config: Any) -> Iterator[str]:
    for applies, reason in rules:
        found = applies(vllm_config)
        if found:
            yield f"{reason} ({found})" if isinstance(found, str) else reason


def star_page_size(vllm_config: Any) -> int:
    """Tokens of a full-attention KV page, as far as the configuration says before the engine has started."""
    own = getattr(vllm_config.model_config.hf_text_config, "page_tokens", None)
    return own or page_size_before_start(vllm_config)


def is_attamba(vllm_config: Any) -> bool:
    """Whether the model is an Attamba, whose layers attend by themselves."""
    return getattr(vllm_config.model_config.hf_text_config, "model_type", None) == "attamba"


NO_OVERLAP = "an Attamba model's window ends at the border of a star block, and an overlap would go beyond it"


def engine_facts(vllm_config: Any, page_size: int | None) -> EngineFacts:
    """What is known of an engine, as far as its configuration and the reports of engine cores that have started say.

    Args:
        page_size: tokens of a KV page of the full-attention layers.
    """
    return EngineFacts(
        page_size,
        tuple(star_refusals(vllm_config)),
        functools.cache(lambda: tuple(document_refusals(vllm_config))),
        functools.cache(lambda: scores_of(vllm_config)),
        functools.cache(lambda: tuple(heads_refusals(vllm_config))),
        NO_OVERLAP if is_attamba(vllm_config) else None,
        replica_set(vllm_config),
        vllm_config.model_config.max_model_len - 1,  # a prompt leaves room for one token of output
        divides_kv=default_num_shards(vllm_config) > 1,
        quality_sizes=_options(vllm_config).quality_sizes,
        adapter=adapter_of(_options(vllm_config)),
    )
