"""vLLM's worker, which also keeps each star request's plan and opens a step around the model runner."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from vllm.config import set_current_vllm_config
from vllm.logger import init_logger
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.worker.worker_base import WorkerBase

from starling.attention_backends.kernels.rotary import Rotation
from starling.attention_backends.paged.names import CLASSES, register_paged_backend
from starling.attention_backends.star.backend import register_star_backends, takes_star
from starling.attention_backends.star.graph_ranges import fits_graphs
from starling.attention_backends.star.head_calls import dense_heads_in_use, use_dense_heads
from starling.attention_backends.star.head_calls import unsupported_reason as heads_unsupported
from starling.attention_backends.star.rows import VirtualRows, is_split
from starling.attention_backends.star.step import StarStep, open_step, set_positions
from starling.attention_backends.star.turned_impl import (
    block_positions_in_use,
    turns_queries,
    use_block_positions,
    use_rotations,
)
from starling.config.entry import STAR_ADAPTER, STAR_HEADS, config_of
from starling.config.head_scores import HeadScores
from starling.engine_ext.adapter import own_adapter
from starling.engine_ext.front.metrics import worker_metrics
from starling.engine_ext.head_scores import ranks_of_layers, scores_of
from starling.engine_ext.refusals import (
    has_dense_heads,
    has_documents,
    has_library,
    has_peers,
    is_made_for_documents,
    reads_all_caches,
    star_refusals,
)
from starling.engine_ext.worker.rotations import block_positions_problem, make_rotations, turning_layers
from starling.replicas.metrics import replica_metrics
from starling.replicas.weights import note_weights
from starling.scheduler.star.plan import StarPlan
from starling.scheduler.star.request_metadata import RequestMetadata, metadata_of
from starling.scheduler.star.rules import HEADS
from starling.vllm_compat.models import without_prefill_checkpoints
from starling.vllm_compat.patching import extends
from starling.vllm_compat.rotary import attention_blocks
from starling.vllm_compat.worker import (
    batch_request_ids,
    before_forward,
    keep_request_ids,
    kv_connector,
    metadata_builders,
    unlink_shared_memory,
    without_discarded_generators,
    without_full_graphs,
)

logger = init_logger("vllm.starling")

BASES = {
    "StarCPUWorker": "vllm.v1.worker.cpu_worker.CPUWorker",
    "StarGPUWorker": "vllm.v1.worker.gpu_worker.Worker",
}


class StarRequests:
    """The metadata of the star requests that the model runner holds, by request id."""

    def __init__(self) -> None:
        self.metadata: dict[str, RequestMetadata] = {}

    def update(self, output: Any) -> dict[str, StarPlan]:
        """Take in a scheduler step.

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


def count_rows(rows: VirtualRows) -> None:
    metrics = worker_metrics()
    metrics.context_tokens.inc(rows.context_tokens)
    metrics.keys_attended.inc(rows.star_pairs)
    metrics.keys_dense.inc(rows.dense_pairs)


def register_backends(vllm_config: Any, refusals: list[str]) -> None:
    """Register the star backends in this process where star can run, and always on CPU.

    On GPUs a star backend has smaller full CUDA graphs and larger buffers than vLLM's. On CPU it also has Starling's
    attention op, which dense batches use too.
    """
    is_cpu = vllm_config.device_config.device_type == "cpu"
    config = config_of(vllm_config)
    use_block_positions(is_made_for_documents(vllm_config))
    use_dense_heads(not is_cpu and has_dense_heads(vllm_config) and not has_documents(vllm_config))
    own = config.gpu_attention if config and config.gpu_attention in CLASSES else None
    if own:
        register_paged_backend(own)
    if is_cpu or not refusals:
        register_star_backends(own)
    if is_cpu:
        from starling.attention_backends.star import cpu_impl

        cpu_impl.use_cpu_attention(config.cpu_attention if config else "vllm")
        cpu_impl.read_all_caches(reads_all_caches(vllm_config))
        if vllm_config.lora_config is not None:
            from starling.vllm_compat.cpu_lora import use_masked_lora

            use_masked_lora()


def unsplit_layers(builders: Sequence[tuple[Any, Sequence[str]]]) -> str | None:
    """Why a model can't run star rows on the metadata builders of its layers; None where it can.

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


@extends(WorkerBase)
class StarWorker:
    """Mixed into a platform's worker, before it: runs star requests."""

    # vLLM's own.
    rank: int
    vllm_config: Any
    model_runner: Any

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        self.star_refusals = star_refusals(vllm_config)
        self.star_problem: str | None = None
        self.block_positions_problem: str | None = None
        self.rotations: dict[str, Rotation] | None = None
        self.heads_problem: str | None = None
        self.heads_order: str | None = None
        self.head_ranks: dict[str, np.ndarray] = {}
        self.head_scores: HeadScores | None = None
        self.is_warming_up = False
        register_backends(vllm_config, self.star_refusals)
        if has_peers(vllm_config) or has_library(vllm_config):
            note_weights()
        super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]
        self.star_requests = StarRequests()
        self.counts_rows = self.rank == 0
        replica = str(vllm_config.parallel_config.data_parallel_index)
        self.computed_tokens = worker_metrics().computed_tokens.labels(replica)
        replica_metrics()  # on /metrics also where no page is ever moved

    def init_device(self) -> Any:
        result = super().init_device()  # type: ignore[misc]
        unlink_shared_memory(self.rank)
        keep_request_ids(self.model_runner)
        return result

    def load_model(self, **options: Any) -> None:
        """As vLLM's, and readies the model for documents: vLLM then captures graphs, and sizes the KV cache by them."""
        super().load_model(**options)  # type: ignore[misc]
        if self.star_refusals or not block_positions_in_use():
            return
        if self.vllm_config.device_config.device_type != "cpu":
            with set_current_vllm_config(self.vllm_config):
                self._check_block_positions(turning_layers(self.vllm_config))
        if block_positions_in_use():
            use_rotations(self._made_rotations())

    def get_kv_cache_spec(self) -> dict[str, Any]:
        specs: dict[str, Any] = super().get_kv_cache_spec()  # type: ignore[misc]
        is_cpu = self.vllm_config.device_config.device_type == "cpu"
        return without_prefill_checkpoints(specs) if is_cpu else specs

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> Any:
        result = super().initialize_from_config(*args, **kwargs)  # type: ignore[misc]
        if not self.star_refusals:
            self._check_layers()
        return result

    def compile_or_warm_up_model(self) -> Any:
        """As vLLM's; the V2 model runner's warm-up calls ``execute_model`` with requests of its own."""
        self.is_warming_up = True
        try:
            self._warm_up_documents()  # before vLLM watches for kernels that are compiled later
            result = super().compile_or_warm_up_model()  # type: ignore[misc]
        finally:
            self.is_warming_up = False
        self._load_adapter()
        return result

    def _load_adapter(self) -> None:
        """Load the engine's adapter, for good: else the first prompt waits for it, and an error of it ends the engine.

        Raises:
            RuntimeError: vLLM can't load it.
        """
        adapter = own_adapter(self.vllm_config)
        if adapter is None:
            return
        try:
            self.add_lora(adapter)  # type: ignore[attr-defined]
            self.pin_lora(adapter.lora_int_id)  # type: ignore[attr-defined]
        except Exception as error:  # whatever vLLM makes of the files
            raise RuntimeError(f"{STAR_ADAPTER}={adapter.lora_path}: vLLM can't load it: {error}") from error

    def _warm_up_documents(self) -> None:
        """Compile the kernels of steps over documents, where an engine on a GPU may have such steps."""
        if self.rotations is None or self.vllm_config.device_config.device_type == "cpu":
            return
        from starling.attention_backends.star.warm_up import warm_up  # imports Triton, which a CPU does not need

        blocks = attention_blocks(self.model_runner.get_model())
        layers = (blocks[name].attention for name in self.rotations)
        warm_up([layer for layer in layers if turns_queries(layer.impl)], self.rotations)

    def _check_layers(self) -> None:
        """Find out whether the loaded model's layers can run star rows; engine_report.py asks for the result.

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
        names, others = (
            [name for builder, layers in builders if getattr(builder, "takes_star", False) == full for name in layers]
            for full in (True, False)
        )
        if self.vllm_config.device_config.device_type == "cpu":  # on a GPU, load_model has done so
            self._check_block_positions(names)
        self._check_heads(names, others)
        star = sum(len(layers) for builder, layers in builders if getattr(builder, "takes_star", False))
        # The state of KV shifting, and the inputs of Attamba's open chunks, hold no keys.
        total = sum(len(layers) for builder, layers in builders if getattr(builder, "holds_keys", True))
        if star < total:
            logger.info_once("Star Attention runs on the %d full-attention layers of %d", star, total)

    def _check_block_positions(self, layer_names: list[str]) -> None:
        """Find out whether these layers can attend to blocks with positions of their own.

        Where they can't, the engine is not made for such blocks: graphs are captured with vLLM's kernels alone.

        Raises:
            RuntimeError: they can't, and prompts have such blocks by default.
        """
        model = self.model_runner.get_model()
        device_type = self.vllm_config.device_config.device_type
        of_model = self.vllm_config.model_config
        self.block_positions_problem = block_positions_problem(
            model, layer_names, device_type, of_model.get_hidden_size(), of_model.dtype
        )
        if self.block_positions_problem is None:
            # In both model runners, the slots of a step's tokens are known before this: they follow from positions.
            before_forward(self.model_runner, set_positions)
            return
        config = config_of(self.vllm_config)
        if config is None or not block_positions_in_use():
            return
        if config.star.mode != "off":
            refused = f"star_segments={config.star.segments} is refused: {self.block_positions_problem}"
            raise RuntimeError(f"{refused}. Allowed for this model: off")
        logger.warning("star_segments=%s has no effect here: %s", config.star.segments, self.block_positions_problem)
        use_block_positions(False)

    def _check_heads(self, layer_names: list[str], other_names: list[str]) -> None:
        """Find out whether some heads of these layers can see everything while the others see star blocks.

        Args:
            other_names: the layers that are not full attention.

        Raises:
            RuntimeError: they can't, and prompts have such heads by default.
        """
        self.head_scores = scores_of(self.vllm_config)
        if self.head_scores is None:
            return
        self.heads_order = self.head_scores.order_digest
        ranks, self.heads_problem = ranks_of_layers(
            self.head_scores, self.model_runner.get_model(), layer_names, other_names
        )
        self.head_ranks = ranks
        on_cpu = self.vllm_config.device_config.device_type == "cpu"
        if self.heads_problem is None and (on_cpu or dense_heads_in_use()):
            layers = attention_blocks(self.model_runner.get_model())
            reasons = ((name, heads_unsupported(layers[name].attention)) for name in ranks)
            self.heads_problem = next((f"layer {name}: {reason}" for name, reason in reasons if reason), None)
        if self.heads_problem is None:
            return
        config = config_of(self.vllm_config)
        if config is not None and has_dense_heads(self.vllm_config) and config.star.mode != "off":
            share, path = config.star.dense_heads, config.star_heads
            asked = f"{STAR_HEADS}={path}" if share is None else f"{HEADS}={share}"
            raise RuntimeError(f"{asked}: {self.heads_problem}")

    def _check_digests(self, plans: Iterable[StarPlan]) -> None:
        """Refuse plans whose dense heads are not those of this worker's scores (raises RuntimeError)."""
        for heads in filter(None, (plan.dense_heads for plan in plans)):
            if self.heads_problem is not None:
                raise RuntimeError(f"a plan has {heads.count} dense heads: {self.heads_problem}")
            if self.head_scores is None or self.head_scores.digest(heads.count) != heads.digest:
                raise RuntimeError(f"a plan has {heads.count} dense heads, which are not those of this worker's scores")

    def _rotations(self, plans: Iterable[StarPlan]) -> dict[str, Rotation] | None:
        """Layer name -> how its queries are turned to the positions of a block, where a plan needs it."""
        needed = any(plan.documents for plan in plans)
        return self._made_rotations() if needed else self.rotations

    def _made_rotations(self) -> dict[str, Rotation]:
        """Layer name -> how its queries are turned; made at its first use."""
        if self.rotations is None:
            max_model_len = self.vllm_config.model_config.max_model_len
            self.rotations = make_rotations(self.model_runner.get_model(), max_model_len)
        return self.rotations

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if self.counts_rows and not self.is_warming_up:
            self.computed_tokens.inc(scheduler_output.total_num_scheduled_tokens)
        plans = self.star_requests.update(scheduler_output)
        if not plans:
            return super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        self._check_digests(plans.values())
        held = self.star_requests.metadata
        remote = {name: shards for name in plans if (shards := held[name].remote) is not None}
        step = StarStep(
            plans,
            scheduler_output.num_scheduled_tokens,
            functools.partial(batch_request_ids, self.model_runner),
            count_rows if self.counts_rows else lambda rows: None,
            remote,
            kv_connector().remote_attention if remote else None,
            self._rotations(plans.values()),
            self.head_ranks,
        )
        fits = fits_graphs(plans.values(), len(scheduler_output.num_scheduled_tokens))
        with open_step(step), contextlib.nullcontext() if fits else without_full_graphs(self.model_runner):
            return super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]

    def open_shard(self, name: str, page_ids: list[int]) -> dict[str, Any]:
        return kv_connector().open_shard(name, page_ids, self._made_rotations)

    def close_shards(self, names: list[str]) -> None:
        kv_connector().close_shards(names)

    def forget_servers(self, servers: list[str]) -> None:
        kv_connector().forget_servers(servers)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        with without_discarded_generators(self.model_runner):
            return super().sample_tokens(*args, **kwargs)  # type: ignore[misc]


@functools.cache
def make_star_worker(base: type) -> type:
    """A subclass of a platform's worker that runs star requests."""
    return type(f"Star{base.__name__}", (StarWorker, base), {"__module__": __name__})


def __getattr__(name: str) -> type:
    """``StarCPUWorker`` and ``StarGPUWorker``, made when vLLM resolves their names."""
    if name not in BASES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return make_star_worker(resolve_obj_by_qualname(BASES[name]))
