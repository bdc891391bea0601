"""Worker of vLLM that registers the star backends, keeps each request's plan, and opens a step around the runner."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

from prometheus_client import Counter
from vllm.logger import init_logger
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.worker.worker_base import WorkerBase

from starling.attention_backends.paged import CLASSES, register_paged_backend
from starling.attention_backends.star.backend import register_star_backends, takes_star
from starling.attention_backends.star.document_layers import DocumentLayers, HeadLayers
from starling.attention_backends.star.range_attention import fits_graphs
from starling.attention_backends.star.refusals import BLOCK_POSITIONS, STAR, star_refusals
from starling.attention_backends.star.rows import VirtualRows, is_split
from starling.attention_backends.star.step import StarStep, open_step
from starling.config.entry import config_of
from starling.features import make_features
from starling.scheduler.planning.plan import StarPlan
from starling.scheduler.planning.request_metadata import RequestMetadata, metadata_of
from starling.vllm_compat.metrics import report_to_front
from starling.vllm_compat.models import without_prefill_checkpoints
from starling.vllm_compat.patching import extends
from starling.vllm_compat.worker import (
    batch_request_ids,
    keep_request_ids,
    metadata_builders,
    unlink_shared_memory,
    without_discarded_generators,
    without_full_graphs,
)


def register_backends(vllm_config: Any, refusals: list[str], by_parts: bool) -> None:
    """Register the star backends in this process if star can run, and always on CPU.

    On GPUs a star backend has smaller full CUDA graphs and larger buffers than vLLM's. On CPU it also has Starling's
    attention op, which dense batches use too.

    Args:
        vllm_config: configuration of the engine.
        refusals: why star can't run; empty if it can.
        by_parts: whether layers on a GPU are made to attend by the documents or the dense heads of a step.
    """
    is_cpu = vllm_config.device_config.device_type == "cpu"
    config = config_of(vllm_config)
    own = config.gpu_attention if config and config.gpu_attention in CLASSES else None
    if own:
        register_paged_backend(own)
    if is_cpu or not refusals:
        register_star_backends(own, by_parts)
    if is_cpu and vllm_config.lora_config is not None:
        from starling.attention_backends.kernels.cpu.lora_op import use_own_lora

        use_own_lora()


def unsplit_layers(builders: Sequence[tuple[Any, Sequence[str]]]) -> str | None:
    """Return why a model can't run star rows on the metadata builders of its layers, or None if it can.

    All full-attention layers must split their rows. A layer that does not would attend to the whole prompt, and its KV
    would then be cached as that of independent star blocks.

    Args:
        builders: (metadata builder, names of its layers), for all layers.
    """
    splits = [getattr(builder, "takes_star", False) for builder, _ in builders]
    unable = {
        type(builder).__name__
        for (builder, _), able in zip(builders, splits, strict=True)
        if not able and getattr(builder, "holds_keys", True) and takes_star(getattr(builder, "kv_cache_spec", None))
    }
    if any(splits) and not unable:
        return None
    names = ", ".join(sorted(unable or {type(builder).__name__ for builder, _ in builders}))
    which = "full-attention layers" if unable else "all layers"
    return f"{which} run on an attention backend that is not wrapped, with the metadata builders {names}"


class WorkerMetrics:
    """Metrics counted from the rows handed to the attention kernel, on one rank of each engine."""

    def __init__(self) -> None:
        report_to_front()
        self.context_tokens = Counter("starling:context_tokens", "Prompt tokens prefilled in star blocks.")
        self.keys_attended = Counter(
            "starling:keys_attended",
            "Query-key pairs of those tokens, per head and full-attention layer (a mean).",
        )
        self.keys_dense = Counter(
            "starling:keys_dense", "Query-key pairs that the same tokens would have under dense attention."
        )
        self.computed_tokens = Counter(
            "starling:computed_tokens",
            "Tokens that the model ran over; cached and fetched tokens are not among them.",
            ["replica"],
        )


worker_metrics = functools.cache(WorkerMetrics)


def count_rows(rows: VirtualRows) -> None:
    """Count the rows of a step."""
    metrics = worker_metrics()
    metrics.context_tokens.inc(rows.context_tokens)
    metrics.keys_attended.inc(rows.star_pairs)
    metrics.keys_dense.inc(rows.dense_pairs)


class StarRequests:
    """The metadata of the star requests that the model runner holds, by request id."""

    def __init__(self) -> None:
        self.metadata: dict[str, RequestMetadata] = {}

    def update(self, output: Any) -> dict[str, StarPlan]:
        """Update the metadata from a scheduler step.

        A preempted request keeps its plan: V1 resumes it as cached, V2 sends it out as new again.

        Returns:
            The plans of the step's requests whose rows are split, or that have KV on other replicas.
        """
        for request_id in output.finished_req_ids:
            self.metadata.pop(request_id, None)
        starts = []
        for new in output.scheduled_new_reqs:
            metadata = metadata_of(new)
            if metadata.plan is not None:
                self.metadata[new.req_id] = metadata
            starts.append((new.req_id, new.num_computed_tokens))
        if not self.metadata:
            return {}
        cached = output.scheduled_cached_reqs
        starts.extend(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        found = ((request_id, self.metadata.get(request_id), start) for request_id, start in starts)
        return {
            request_id: metadata.plan
            for request_id, metadata, start in found
            if metadata and metadata.plan and (is_split(metadata.plan, start) or metadata.remote)
        }


logger = init_logger("vllm.starling")

BASES = {
    "StarCPUWorker": "vllm.v1.worker.cpu_worker.CPUWorker",
    "StarGPUWorker": "vllm.v1.worker.gpu_worker.Worker",
}


@extends(WorkerBase)
class StarWorker:
    """Mixin that precedes a platform's worker: it runs star requests, and calls the hooks of its parts (features/)."""

    # vLLM's own.
    rank: int
    vllm_config: Any
    model_runner: Any

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        self.star_refusals = star_refusals(vllm_config)
        self.star_problem: str | None = None
        self.is_warming_up = False
        self.documents, self.heads = DocumentLayers.make(vllm_config), HeadLayers.make(vllm_config)
        self.features = make_features("worker", vllm_config)
        by_parts = self.documents.attends_by_parts or self.heads.attends_by_parts
        register_backends(vllm_config, self.star_refusals, by_parts)
        super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]
        self.star_requests = StarRequests()
        self.counts_rows = self.rank == 0
        replica = str(vllm_config.parallel_config.data_parallel_index)
        self.computed_tokens = worker_metrics().computed_tokens.labels(replica)

    def star_report(self) -> dict[str, str | None]:
        """Return why the loaded model's layers can't run parts of Star Attention, by field (engine_core.py)."""
        return {STAR: self.star_problem, BLOCK_POSITIONS: self.documents.problem} | self.heads.report()

    def init_device(self) -> Any:
        result = super().init_device()  # type: ignore[misc]
        unlink_shared_memory(self.rank)
        keep_request_ids(self.model_runner)
        return result

    def load_model(self, **options: Any) -> None:
        super().load_model(**options)  # type: ignore[misc]
        self.documents.loaded(self)

    def get_kv_cache_spec(self) -> dict[str, Any]:
        specs: dict[str, Any] = super().get_kv_cache_spec()  # type: ignore[misc]
        is_cpu = self.vllm_config.device_config.device_type == "cpu"
        return without_prefill_checkpoints(specs) if is_cpu else specs

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> Any:
        result = super().initialize_from_config(*args, **kwargs)  # type: ignore[misc]
        if not self.star_refusals:
            self._check_layers()
        return result

    def _check_layers(self) -> None:
        """Find out whether the loaded model's layers can run star rows.

        Raises:
            RuntimeError: they can't, and star is on by default.
        """
        builders = metadata_builders(self.model_runner)
        self.star_problem = unsplit_layers(builders)
        if self.star_problem is not None:
            config = config_of(self.vllm_config)
            if config is None or config.star.mode == "on":
                raise RuntimeError(self.star_problem)
            return
        full, others = (
            [name for builder, names in builders if getattr(builder, "takes_star", False) == is_full for name in names]
            for is_full in (True, False)
        )
        self.documents.layers_known(self, full)
        self.heads.layers_known(self, full, others)
        # The state of KV shifting, and the inputs of Attamba's open chunks, hold no keys.
        total = sum(len(names) for builder, names in builders if getattr(builder, "holds_keys", True))
        if len(full) < total:
            logger.info_once("Star Attention runs on the %d full-attention layers of %d", len(full), total)

    def compile_or_warm_up_model(self) -> Any:
        """Compile or warm up as vLLM does; the V2 model runner calls ``execute_model`` with its own requests then."""
        self.is_warming_up = True
        try:
            self.documents.before_warm_up(self)
            result = super().compile_or_warm_up_model()  # type: ignore[misc]
        finally:
            self.is_warming_up = False
        if (adapter := self.features.get("adapter")) is not None:
            adapter.load(self)
        return result

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if self.counts_rows and not self.is_warming_up:
            self.computed_tokens.inc(scheduler_output.total_num_scheduled_tokens)
        plans = self.star_requests.update(scheduler_output)
        if not plans:
            return super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        replicas = self.features.get("replicas")
        step = StarStep(
            plans,
            scheduler_output.num_scheduled_tokens,
            functools.partial(batch_request_ids, self.model_runner),
            count_rows if self.counts_rows else lambda rows: None,
            self.documents.step(self, plans),
            self.heads.step(plans),
            None if replicas is None else replicas.step(plans, self.star_requests.metadata),
        )
        fits = fits_graphs(plans.values(), len(scheduler_output.num_scheduled_tokens))
        with open_step(step), contextlib.nullcontext() if fits else without_full_graphs(self.model_runner):
            return super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        with without_discarded_generators(self.model_runner):
            return super().sample_tokens(*args, **kwargs)  # type: ignore[misc]


@functools.cache
def make_star_worker(base: type) -> type:
    """Make a subclass of a platform's worker that runs star requests."""
    return type(f"Star{base.__name__}", (StarWorker, base), {"__module__": __name__})


def __getattr__(name: str) -> type:
    """Return ``StarCPUWorker`` or ``StarGPUWorker``, made when vLLM resolves its name."""
    if name not in BASES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return make_star_worker(resolve_obj_by_qualname(BASES[name]))
