"""vLLM's scheduler with Star Attention: page keys, prefix hits and chunks by star plans, and bounded long prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.diffusion_scheduler import DiffusionAsyncScheduler, DiffusionScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import RequestStatus

from starling.config.entry import StarlingConfig, config_of
from starling.config.scheduling import MIN_CHUNK, SchedulingOptions
from starling.config.star import StarOptions
from starling.scheduler.block_padding import count_client_tokens, padded_plan, with_padding, without_padding
from starling.scheduler.block_reuse import BlockReuse, reuse_refusal
from starling.scheduler.cache_keys import independent_block_hasher, page_keys
from starling.scheduler.cache_state import cache_state, compressed_groups, states_used
from starling.scheduler.core_rpc import add_core_rpc
from starling.scheduler.live_requests import LiveRequests
from starling.scheduler.metrics import cache_metrics, scheduler_metrics
from starling.scheduler.prefill_limiter import PrefillLimiter
from starling.scheduler.provenance import MEMORY, Provenance
from starling.scheduler.quarantine import Quarantine
from starling.scheduler.star.plan import StarPlan
from starling.scheduler.star.request_metadata import LOST, default_num_shards, metadata_of
from starling.scheduler.star.rules import check_sizes
from starling.scheduler.step_budget import make_limits
from starling.scheduler.worker_report import worker_report
from starling.vllm_compat.engine_core import amend_requests
from starling.vllm_compat.kv_pages import Page
from starling.vllm_compat.patching import extends
from starling.vllm_compat.prefix_cache import add_page_keys, leave_out_of_hit_rate, use_request_hasher
from starling.vllm_compat.scheduler_hooks import SchedulerHooks

if TYPE_CHECKING:  # imports vLLM's offloading, which only a scheduler with a library needs
    from starling.scheduler.page_loads import PageLoads

logger = init_logger("vllm.starling")


@runtime_checkable
class LoadsPages(Protocol):
    """A KV connector that loads single pages: library/connector.py."""

    def make_page_loads(self, view: Any, group: Any) -> PageLoads: ...


def is_incomplete(request: Any) -> bool:
    """Whether a request leaves tokens of its prompt to other replicas, so that its prefix hits are no measure."""
    metadata = metadata_of(request)
    return metadata.part is not None or metadata.remote is not None


@extends(Scheduler)
class StarMixin(SchedulerHooks):
    """Mixed into a vLLM scheduler class, before it.

    The page keys go in where vLLM makes its own, so that hashing, KV events and partial hits agree.
    """

    # vLLM's own.
    requests: dict[str, Any]
    max_num_scheduled_tokens: int
    scheduler_config: Any
    connector: Any  # replicas/scheduler_connector.py, where prompts are split over replicas

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        add_page_keys(page_keys)
        leave_out_of_hit_rate(is_incomplete)
        add_core_rpc()
        amend_requests(with_padding)
        super().__init__(vllm_config, *args, **kwargs)
        self.decode_graphs = vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs()
        config = config_of(vllm_config) or StarlingConfig()
        self._check_defaults(config.star)
        options = config.scheduling
        self.limiter = self._make_limiter(options) if options.fairness == "on" else None
        self.reuse = self._make_reuse(vllm_config) if options.star_block_reuse == "on" else None
        self.page_loads = self._make_page_loads()
        self.provenance = self._make_provenance()
        use_request_hasher(independent_block_hasher if self.reuse else None)
        self.kv_is_divided = default_num_shards(vllm_config) > 1
        self.metrics = scheduler_metrics()
        self.quarantine = Quarantine(self.view)
        self.is_stalled = False  # nothing was scheduled in the last step, and nothing runs
        self.padded: dict[str, StarPlan] = {}  # by request
        self.live: LiveRequests | None = None  # while somebody looks at the live page
        self.compressed = compressed_groups(self)
        if self.compressed:
            self._report_cache_sizes()

    def _make_limiter(self, options: SchedulingOptions) -> PrefillLimiter | None:
        if not self.scheduler_config.enable_chunked_prefill:
            reason = "chunked prefill is off, so a prompt is prefilled in one step"
            logger.warning("--scheduler-fairness has no effect here: %s", reason)
            return None
        return PrefillLimiter(self, make_limits(options, self.max_num_scheduled_tokens, self.view.chunk_unit))

    def _make_reuse(self, vllm_config: Any) -> BlockReuse | None:
        group = self.view.only_group
        refusal = reuse_refusal(vllm_config) or (None if group else "the KV cache has several groups of layers")
        if refusal is not None or group is None:
            logger.info("Reuse of star blocks behind an edit is off: %s", refusal)
            return None
        return BlockReuse(self.view, group)

    def _make_page_loads(self) -> PageLoads | None:
        group = self.view.only_group
        if self.reuse is None or group is None or not isinstance(self.connector, LoadsPages):
            return None
        return self.connector.make_page_loads(self.view, group)

    def _make_provenance(self) -> Provenance | None:
        group = self.view.only_group
        if group is None:
            return None
        source_of = (lambda page, request_id: MEMORY) if self.page_loads is None else self.page_loads.source_of
        provenance = Provenance(group.page_size, source_of)
        if self.reuse is not None:
            self.reuse.on_adopted = provenance.take
        return provenance

    def _check_defaults(self, options: StarOptions) -> None:
        """Hold the server's star options against the page that the engine really has (raises OptionError)."""
        page_size = self.view.full_attention_page_size
        if options.mode == "on" or (options.mode == "auto" and page_size is not None):
            check_sizes(options, page_size)

    def _report_cache_sizes(self) -> None:
        metrics = cache_metrics()
        state = cache_state(self, per_request=False)
        for index, group in enumerate(state["groups"]):
            metrics.bytes_per_token.labels(str(index), group["kind"]).set(group.get("bytes_per_token", 0))
        for cache, field in (("compressed", "capacity_tokens"), ("uncompressed", "uncompressed_capacity_tokens")):
            metrics.capacity.labels(cache).set(state.get(field, 0))

    # What vLLM calls.

    def add_request(self, request: Any) -> None:
        if self.kv_is_divided and request.max_tokens:
            request.max_tokens = min(request.max_tokens, self._max_output_tokens(request))
        super().add_request(request)  # type: ignore[misc]
        name: str = request.request_id
        if self.requests.get(name) is not request:  # more input of a session
            return
        padded = padded_plan(request)
        if padded is not None:
            self.padded[name] = padded
        remote = metadata_of(request).remote
        if remote is not None:
            self.connector.begin_remote_attention(remote.local_name)
        if self.reuse is not None:
            self.reuse.add(request)
        if self.limiter is not None and self.limiter.may_be_long(request):
            self.limiter.add(request, self._num_cached_tokens(request))

    def schedule(self, throttle_prefills: bool = False) -> Any:
        if self.reuse is not None and self.reuse.requests and not self.view.is_paused:
            self.metrics.count_hit("block", self.reuse.adopt_all())
        if self.page_loads is not None:
            self.page_loads.step()
        held_out = self._waits_for_held_pages() if self.is_stalled else []
        if held_out:
            with self.view.without_waiting(held_out):
                output = super().schedule(throttle_prefills)  # type: ignore[misc]
        elif self.limiter is None or not self.limiter.prompts:
            output = super().schedule(throttle_prefills)  # type: ignore[misc]
        else:
            with self.limiter.step():
                output = super().schedule(throttle_prefills)  # type: ignore[misc]
            self.metrics.deferred_tokens.inc(self.limiter.deferred)
        # The step after one in which a split prompt might pass is an ordinary one.
        self.is_stalled = not (output.total_num_scheduled_tokens or held_out) and self.view.nothing_runs
        return output

    def _waits_for_held_pages(self) -> list[Any]:
        """The requests that wait beside the first one of a split prompt; none where no such request waits.

        A split prompt holds the pages of its parts, so a request before it may wait for just these pages. Where nothing
        else runs, both would wait for good, unless the split prompt passes. The memory it needs is reserved among the
        split prompts.
        """
        waiting = list(self.view.scheduler.waiting)
        split = next((request for request in waiting if metadata_of(request).is_split), None)
        if split is None:
            return []
        return [request for request in waiting if request is not split]

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        report = worker_report(model_runner_output)
        if report.stuck_pages:
            self.quarantine.add(report.stuck_pages)
        ended = self._end_lost_requests(report.reasons)
        logprobs = model_runner_output.prompt_logprobs_dict
        for name in self.padded.keys() & logprobs.keys():
            logprobs[name] = without_padding(self.padded[name], logprobs[name])
        result = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        if self.provenance is not None and self.provenance.noted:
            self._say_sources(self.provenance, result)
        if self.padded:
            self._count_as_the_client(result)
        if report.stuck_pages or report.freed_pages:
            ended += self._leave_quarantine(report.freed_pages)
        for request, reason in ended:
            outputs = result.setdefault(request.client_index, EngineCoreOutputs())
            outputs.outputs.append(
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=request.get_finished_reason(),
                    kv_transfer_params={LOST: reason},
                )
            )
        if self.live is not None and not self.live.is_watched:
            self.live = None
        if self.live is not None:
            self.live.note_outputs(result)
        if self.compressed:
            cache_metrics().states.set(sum(states_used(self, group) for group in self.compressed))
        return result

    # What fronts call.

    def look_at_requests(self) -> dict[str, Any]:
        """The requests as the live page shows them; from now on, and for a while, what it shows later is noted."""
        if self.live is None:
            self.live = LiveRequests(self)
        return self.live.look()

    # Hooks of SchedulerHooks.

    def extend_prefix_hit(self, request: Any, pages: Sequence[Page], num_tokens: int) -> list[Page] | None:
        """Let a request go on behind the tokens of its prompt that other replicas compute or hold.

        A part of a prompt goes on, after the anchor, at its own first block. The pages in between are vLLM's null page,
        which takes no memory and is never hashed: no other request can find it, and star rows never read it. The part's
        own blocks have the keys of the whole prompt, and may be cached. Where the anchor is not cached, the part
        computes everything.

        A prompt whose KV stays on other replicas goes on behind what they hold; its own start is held here.
        """
        metadata = metadata_of(request)
        part, remote = metadata.part, metadata.remote
        if remote is not None:
            extended, resume = list(self.connector.held_pages(remote.local_name)), remote.span()[1]
        elif part is not None and part.anchor_size <= num_tokens < part.start:
            extended, resume = list(pages), part.start
        else:
            return None
        extended += [self.view.pool.null_page] * (resume // self.block_size - len(extended))
        # vLLM, too, leaves the last prompt token to be computed.
        rest = request.block_hashes[len(extended) : (request.num_tokens - 1) // self.block_size]
        return extended + self.view.pool.find_run(rest)

    def kept_boundary(self, request: Any, num_tokens: int, found: int) -> int:
        """The end of the context, where the next turn of a chat goes on, or the border that vLLM has found.

        Behind the context, the keys of pages contain its end. vLLM keeps a state or window at the last page of a
        prompt, where only the same prompt finds it. A border that vLLM has found comes first where nothing was hit:
        other prompts begin alike. Else it is where the last turn ended, and each turn would keep the end of the one
        before.
        """
        plan = metadata_of(request).plan
        if plan is None or (found and not num_tokens):
            return found
        return plan.context_end // self.block_size * self.block_size

    def bound_chunk(self, request: Any, start: int, num_tokens: int) -> int:
        """Bound a chunk by its prompt's part of this step, and end it at star blocks that are in the cache.

        A chunk of two tokens or more that would replay a decode graph is made one token shorter.
        """
        if self.limiter is not None:
            num_tokens = self.limiter.bound(request, start, num_tokens)
        if self.reuse is not None:
            num_tokens = self.reuse.clip(request, start, num_tokens, MIN_CHUNK if self.decode_graphs else 1)
        if self.page_loads is not None:
            num_tokens = self.page_loads.bound(request, start, num_tokens) or num_tokens
        return num_tokens - 1 if num_tokens > 1 and self._replays_a_graph(request, start, num_tokens) else num_tokens

    def refuse_chunk(self, request: Any, start: int, num_tokens: int) -> bool:
        """A star chunk of one token waits a step where it would replay a decode graph, and each one for its pages."""
        if self.page_loads is not None and not self.page_loads.bound(request, start, num_tokens):
            return True
        return self._replays_a_graph(request, start, num_tokens)

    def _replays_a_graph(self, request: Any, start: int, num_tokens: int) -> bool:
        """Whether a batch of such chunks replays a full decode graph, whose block tables are not those of star rows."""
        if not self.decode_graphs or num_tokens != self.view.tokens_of_a_decode_graph:
            return False
        plan = metadata_of(request).plan
        return plan is not None and start < plan.context_end and start + num_tokens > plan.head_end

    def before_connector(self, output: Any) -> None:
        self._note_step(output)

    def after_schedule(self, output: Any) -> None:
        if self.connector is None:
            self._note_step(output)

    def _note_step(self, output: Any) -> None:
        """Note which requests a step admits and with which tokens, and report the pages that others have adopted."""
        for new in output.scheduled_new_reqs:
            request = self.requests[new.req_id]
            if not request.num_preemptions and not is_incomplete(request):
                self.metrics.count_hit("prefix", new.num_computed_tokens)
            if self.provenance is not None:
                self.provenance.start(request, self.view.groups[0].pages(new.req_id), new.num_computed_tokens)
        if self.limiter is not None:
            admitted = {new.req_id for new in output.scheduled_new_reqs} | output.scheduled_cached_reqs.resumed_req_ids
            self.limiter.admission.count(self.requests[name] for name in admitted)
        if self.reuse is not None:
            self.reuse.report(output)

    def before_pages_freed(self, request_id: str) -> None:
        if self.reuse is not None:
            self.reuse.forget_pages(request_id)
        if self.page_loads is not None:
            self.page_loads.forget(request_id)
        if self.provenance is not None and not self.requests[request_id].is_finished():
            self.provenance.forget(request_id)
        if self.live is not None and self.requests[request_id].is_finished():
            self.live.note_end(self.requests[request_id])

    # Their parts.

    def _count_as_the_client(self, result: dict[int, Any]) -> None:
        """Let outputs count a prompt's tokens as its client sent them, and forget the plans of ended requests."""
        for outputs in result.values():
            for output in outputs.outputs:
                plan = self.padded.get(output.request_id)
                if plan is not None and output.prefill_stats is not None:
                    count_client_tokens(plan, output.prefill_stats)
        self.padded = {name: plan for name, plan in self.padded.items() if name in self.requests}

    def _say_sources(self, provenance: Provenance, result: dict[int, Any]) -> None:
        """Let first outputs say where the documents of their prompts came from, and count these tokens."""
        for outputs in result.values():
            for output in outputs.outputs:
                for counts in provenance.give(output):
                    self.metrics.count_sources(counts)
        provenance.keep(self.requests)

    def _end_lost_requests(self, lost: dict[str, str]) -> list[tuple[Any, str]]:
        """End the requests of a step that could not attend to all their keys, before its tokens are read.

        What they have computed over the shards leaves the prefix cache, and requests that share such a page end too:
        vLLM hashes a page when it is scheduled, and finds it within the same step.

        Args:
            lost: request id -> reason.

        Returns:
            (request, reason) of each request that ended.
        """
        if not lost:
            return []
        wrong: set[int] = set()
        for name in lost:
            remote = metadata_of(self.requests[name]).remote if name in self.requests else None
            if remote is not None:
                wrong |= set(self._page_ids(name)[remote.span()[1] // self.block_size :])
        reasons = dict(lost)
        for name in self.requests:
            if name not in reasons and wrong.intersection(self._page_ids(name)):
                reasons[name] = "it shares pages with a request that could not attend to all its keys"
        self.view.evict(wrong)
        ended = self.finish_requests(reasons, RequestStatus.FINISHED_ERROR)  # type: ignore[attr-defined]
        return [(request, reasons[request.request_id]) for request in ended]

    def _leave_quarantine(self, freed_pages: Sequence[int]) -> list[tuple[Any, str]]:
        """Take requests off the pages that a failed transfer may still write to, and use those it can't again.

        Returns:
            (request, reason) of each request that has ended, since there are no other pages for it.
        """
        without_pages = self.quarantine.replace_pages(self.requests.values())
        reason = "its pages could not be fetched, and no other ones are free"
        reasons = {request.request_id: reason for request in without_pages}
        ended = self.finish_requests(reasons, RequestStatus.FINISHED_ERROR) if reasons else []  # type: ignore[attr-defined]
        if freed_pages:
            self.quarantine.free(freed_pages)
        self.metrics.quarantined_pages.set(len(self.quarantine.num_writers))
        return [(request, reason) for request in ended]

    def _page_ids(self, request_id: str) -> list[int]:
        return [page.block_id for page in self.view.groups[0].pages(request_id)]

    def _max_output_tokens(self, request: Any) -> int:
        """Tokens that a request can generate until it alone fills the memory: then it ends by its length.

        Where KV is not divided among replicas, vLLM has made sure that a request of max_model_len fits.
        """
        remote = metadata_of(request).remote
        first, stop = (0, 0) if remote is None else remote.span()
        room = self.view.pool.num_pages * self.block_size
        return max(room - (request.num_prompt_tokens - (stop - first)), 1)

    def _num_cached_tokens(self, request: Any) -> int:
        """Prompt tokens that need no computing as the cache is now; 0 where the cache has several groups."""
        group = self.view.only_group
        if group is None or not self.view.may_hit(request):
            return 0
        remote = metadata_of(request).remote
        if remote is not None:
            return remote.span()[1]
        pool = self.view.pool
        if self.reuse is None or request.request_id not in self.reuse.requests:
            return len(pool.find_run(request.block_hashes, group.index)) * group.page_size
        return sum(pool.are_cached(request.block_hashes, group.index)) * group.page_size


class StarScheduler(StarMixin, Scheduler):
    """For engines without async scheduling (CPU)."""


class AsyncStarScheduler(StarMixin, AsyncScheduler):
    """For engines with async scheduling: vLLM turns it off for a class that is not an AsyncScheduler."""


class DiffusionStarScheduler(StarMixin, DiffusionScheduler):
    """For diffusion models, whose canvases of tokens vLLM's scheduler cuts to each request's width."""


class AsyncDiffusionStarScheduler(StarMixin, DiffusionAsyncScheduler):
    """For diffusion models in engines with async scheduling."""
