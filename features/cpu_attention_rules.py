"""Where Starling's CPU attention, which returns its log-sum-exp, does not run."""

from __future__ import annotations

from typing import Any

from starling.attention_backends.kernels.contract import AMX, CPU_ISAS
from starling.attention_backends.kernels.cpu.attention import VECTOR_SIZE
from starling.features.rule import Rule, options_of
from starling.vllm_compat.config import cpu_attention_isa


def unread_isa(config: Any) -> str | None:
    """The instruction set for which vLLM lays out keys, where Starling's CPU attention does not read them."""
    isa = cpu_attention_isa(config)
    if isa in CPU_ISAS or (isa == AMX and options_of(config).reads_all_caches):
        return None
    return isa


CPU_ATTENTION_RULES: tuple[Rule, ...] = (
    Rule(
        lambda c: options_of(c).cpu_attention == "vllm", "cpu_attention=vllm: vLLM's CPU attention gives no log-sum-exp"
    ),
    Rule(
        lambda c: c.model_config.get_head_size() % VECTOR_SIZE,
        f"Starling's CPU attention takes head sizes that are multiples of {VECTOR_SIZE}",
    ),
    Rule(
        unread_isa,
        "on this processor vLLM stores keys in an order that Starling's CPU attention does not read, unless the server "
        "is started with --star-segments or --star-shards on, or with --dtype float32",
    ),
)
