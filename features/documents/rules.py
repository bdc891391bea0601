"""What documents, blocks with positions of their own, do not run with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm import envs
from vllm.config import CUDAGraphMode

from starling.features.cpu_attention_rules import CPU_ATTENTION_RULES
from starling.features.report_fields import BLOCK_POSITIONS
from starling.features.rule import Rule, reasons, reported
from starling.features.server_options import has_documents
from starling.scheduler.star.independence import dependence


def _has_breakable_graphs(config: Any) -> bool:
    has_graphs = config.compilation_config.cudagraph_mode not in (None, CUDAGraphMode.NONE)
    return has_graphs and config.device_config.device_type != "cpu" and envs.VLLM_USE_BREAKABLE_CUDAGRAPH


def _on_cpu(rule: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda config: config.device_config.device_type == "cpu" and rule(config)


DOCUMENT_RULES: tuple[Rule, ...] = (
    Rule(
        lambda c: c.device_config.device_type not in ("cpu", "cuda") and c.device_config.device_type,
        "the kernels run on CPUs and on CUDA devices",
    ),
    Rule(
        lambda c: c.device_config.device_type != "cpu" and not has_documents(c),
        "on a GPU the server has to be started with --star-segments, so that its layers and graphs are made for them",
    ),
    Rule(
        _has_breakable_graphs,
        "breakable CUDA graphs are on (VLLM_USE_BREAKABLE_CUDAGRAPH, VLLM_BATCH_INVARIANT), and documents have not "
        "been tested with them",
    ),
    Rule(lambda c: dependence(c.model_config), "the model's star blocks depend on one another"),
    Rule(lambda c: c.speculative_config, "speculative decoding: drafters take the positions of the prompt"),
    Rule(lambda c: c.model_config.uses_mrope, "M-RoPE: an image's positions depend on the images before it"),
    Rule(
        lambda c: any(not rotary for rotary in getattr(c.model_config.hf_text_config, "no_rope_layers", None) or ()),
        "some layers have no rotary embedding, so that turning a query would change their scores",
    ),
    Rule(
        lambda c: c.device_config.device_type != "cpu" and c.cache_config.cache_dtype.startswith("fp8"),
        "on a GPU the KV cache is fp8, and so may be its queries",
    ),
    *(Rule(_on_cpu(rule), reason) for rule, reason in CPU_ATTENTION_RULES),
    Rule(reported(BLOCK_POSITIONS), "the engine can't run it, as it found when it started"),
)


def document_refusals(vllm_config: Any) -> list[str]:
    """The reasons why blocks can't have positions of their own on this engine; empty where they can."""
    return list(reasons(DOCUMENT_RULES, vllm_config))


def is_made_for_documents(config: Any) -> bool:
    """Whether the engine is made for documents: the server's options say where they start, and nothing refuses them."""
    return has_documents(config) and not document_refusals(config)
