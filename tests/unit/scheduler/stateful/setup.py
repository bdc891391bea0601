"""The schedulers that the machine draws."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st
from vllm.config import KVTransferConfig
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec, MambaSpec, SlidingWindowSpec

from starling.engine_ext.engine_core import AsyncStarScheduler, StarScheduler
from tests.unit.scheduler.simulation import SHAPE, make_scheduler

PAGE_SIZE = 8
MAX_TOKENS = 176
"""Of a prompt and its answer together."""
SPECS = {
    "full": FullAttentionSpec(block_size=PAGE_SIZE, **SHAPE),
    "window": SlidingWindowSpec(block_size=PAGE_SIZE, sliding_window=20, **SHAPE),
    "local": ChunkedLocalAttentionSpec(block_size=PAGE_SIZE, attention_chunk_size=32, **SHAPE),
    "mamba": MambaSpec(block_size=PAGE_SIZE, shapes=((4, 4),), dtypes=(torch.float32,), mamba_cache_mode="align"),
}
KINDS = ("any", "star blocks", "connector", "several groups", "mamba")
"""What a run is about: anything, reuse of star blocks, split prompts, groups that share the pages, or Mamba layers."""


@dataclass(frozen=True)
class Setup:
    """One scheduler.

    Attributes:
        groups: the names of the KV cache groups' specs.
        spare_pages: pages beside those that one request can take.
        whole_fits: whether vLLM admits a prompt only where all of it fits.
        max_num_active: vLLM's --max-num-active-seqs.
        interval: vLLM's --prefill-schedule-interval.
        late: whether the runner runs a step just before its output is returned, and not when it is scheduled.
    """

    policy: str
    is_async: bool
    v2: bool
    late: bool
    groups: str
    step_tokens: int
    max_num_seqs: int
    max_num_active: int | None
    interval: int
    spare_pages: int
    whole_fits: bool
    long_prefill: int
    scheduling: tuple[tuple[str, Any], ...]
    caching: bool
    max_loras: int | None
    connector: bool

    @property
    def specs(self) -> list[Any]:
        return [SPECS[name] for name in self.groups.split()]

    @property
    def has_only_full_attention(self) -> bool:
        """Without it, prompts with documents are refused."""
        return self.groups == "full"

    @property
    def num_pages(self) -> int:
        """The null page included."""
        return 1 + len(self.specs) * (-(-MAX_TOKENS // PAGE_SIZE) + 1) + self.spare_pages

    def make(self, config: Any) -> Any:
        made = copy.copy(config)
        made.scheduler_config, made.cache_config = copy.copy(config.scheduler_config), copy.copy(config.cache_config)
        made.scheduler_config.policy = self.policy
        made.scheduler_config.async_scheduling = self.is_async
        made.scheduler_config.max_num_batched_tokens = self.step_tokens
        made.scheduler_config.max_num_scheduled_tokens = self.step_tokens
        made.scheduler_config.max_num_seqs = self.max_num_seqs
        made.scheduler_config.max_num_active_seqs = self.max_num_active
        made.scheduler_config.scheduler_reserve_full_isl = self.whole_fits
        made.scheduler_config.long_prefill_token_threshold = self.long_prefill
        made.cache_config.enable_prefix_caching = self.caching
        made.cache_config.mamba_cache_mode = "align"
        made.additional_config = {"starling": {"scheduler": dict(self.scheduling)}}
        made.lora_config = None if self.max_loras is None else SimpleNamespace(max_loras=self.max_loras)
        if self.connector:
            made.kv_transfer_config = KVTransferConfig(
                kv_connector="StarConnector",
                kv_connector_module_path="starling.features.replicas.connector",
                kv_role="kv_both",
                kv_load_failure_policy="recompute",
            )
        kind = AsyncStarScheduler if self.is_async else StarScheduler
        return make_scheduler(made, kind, PAGE_SIZE, self.num_pages, self.v2, self.specs)


@st.composite
def setups(draw, kind: str) -> Setup:
    """A scheduler for runs of this kind. The connector is refused without a prefix cache and with several groups."""
    several = ["full window", "full local", "full window local"]
    of_kind = {"any": ["full", "window", *several], "several groups": several, "mamba": ["full mamba", "mamba"]}
    groups = draw(st.sampled_from(of_kind.get(kind, ["full"])))
    max_num_seqs = draw(st.sampled_from([2, 4, 16]))
    options = {
        "fairness": draw(st.sampled_from(["on", "off"])),
        "long_prompt_tokens": draw(st.sampled_from([None, 24])),
        "shared_step_tokens": draw(st.sampled_from([None, 6])),
        "star_block_reuse": "on" if kind == "star blocks" else draw(st.sampled_from(["on", "off"])),
    }
    return Setup(
        policy="priority" if kind == "several groups" else draw(st.sampled_from(["fcfs", "priority"])),
        is_async=draw(st.booleans()),
        v2=draw(st.booleans()),
        late=draw(st.booleans()),
        groups=groups,
        step_tokens=draw(st.sampled_from([13, 40, 40, 100])),
        max_num_seqs=max_num_seqs,
        max_num_active=draw(st.sampled_from([None, None, 1, max_num_seqs])),
        interval=draw(st.sampled_from([1, 1, 2, 3])),
        spare_pages=draw(st.sampled_from([0, 0, 12, 60])),
        whole_fits=draw(st.booleans()),
        long_prefill=draw(st.sampled_from([0, 8, 10])),
        scheduling=tuple((name, value) for name, value in options.items() if value is not None),
        caching=kind != "any" or draw(st.booleans()),
        max_loras=draw(st.sampled_from([None, 1, 2])),
        connector=kind == "connector",
    )
