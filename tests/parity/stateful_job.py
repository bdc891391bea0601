"""Random requests, aborts, preemptions and resets on one engine with a tiny model; its answers are compared.

Arguments: the checkpoint, the library of the engine, then minutes and seed as in tests/stateful.py; `-` is none. The
engine runs in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0), so that its scheduler is looked at after each step.
"""

from __future__ import annotations

import logging
import sys
import traceback
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from starling.features.library.core import PageLoads
from starling.features.library.spec import HostWorker
from tests.parity.documents import block_logprobs
from tests.parity.harness import mask_of, max_gap, reference_logprobs, star, star_sizes
from tests.stateful import CountingMachine, Length, run_machine
from tests.unit.scheduler.library_engine import check_chunks
from tests.unit.scheduler.simulation import random_ids
from tests.unit.scheduler.stateful.checks import check_empty, check_pages, check_queues

PAGE_SIZE, MAX_TOKENS, NUM_PAGES, LIMIT = 32, 512, 18, 1e-4
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": PAGE_SIZE,
    "max_model_len": MAX_TOKENS,
    "num_gpu_blocks_override": NUM_PAGES,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 4,
    "scheduling_policy": "priority",
    "skip_tokenizer_init": True,
}


@dataclass
class Asked:
    """A request that the engine has not ended yet, and how many parallel samples it has."""

    options: dict[str, Any]
    num_samples: int
    num_answers: int


@dataclass(frozen=True)
class Prompt:
    """The start of a text, with another token at some places, and with documents that begin at others.

    The documents begin with the same ``alike`` tokens. They are the same one if all of their tokens are.
    """

    text: int
    length: int
    edits: tuple[int, ...]
    documents: tuple[int, ...]
    alike: int

    def ids(self) -> list[int]:
        ids = random_ids(self.text, self.length)
        starts = self.starts()
        for start, stop in pairwise([*starts, self.length - 40]):
            copied = min(self.alike, stop - start)
            ids[start : start + copied] = ids[starts[0] : starts[0] + copied]
        for place in self.edits:
            ids[place % self.length] = 251
        return ids

    def starts(self) -> list[int]:
        """Where documents start, before the query."""
        return sorted({place % (self.length - 40) for place in self.documents})


prompts = st.builds(
    Prompt,
    text=st.integers(0, 1),
    length=st.sampled_from([60, 130, 200, 250]),
    edits=st.lists(st.integers(0, MAX_TOKENS), max_size=2).map(tuple),
    documents=st.sampled_from([(), (), (), (10,), (15, 70), (40, 125), (0, 40, 80, 120), (32, 72, 112, 152)]),
    alike=st.sampled_from([0, 0, 34, 40]),
)
plans = st.builds(
    star,
    block_size=st.sampled_from([64, 96]),
    query_tokens=st.sampled_from([1, 5, 33]),
    anchor_size=st.sampled_from([None, 0, 32]),
    overlap_size=st.sampled_from([0, 0, 32]),
)


class EngineMachine(CountingMachine):
    """One engine for all runs; each run begins with an empty engine.

    Attributes:
        model: path of the checkpoint.
        library: where the engine has one, its scheduler's side; else None.
    """

    engine: ClassVar[Any] = None
    model: ClassVar[Path]
    library: ClassVar[Any] = None
    numbers: ClassVar[Any] = count()

    @initialize()
    def start(self) -> None:
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.asked: dict[str, Asked] = {}
        self.taken: list[Any] = []
        self.of_documents: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._reset(whole=True)
        self.totals["runs"] += 1

    @precondition(lambda self: len(self.asked) < 6)
    @rule(
        prompt=prompts,
        options=st.none() | plans,
        num_answers=st.sampled_from([1, 4, 40]),
        num_samples=st.sampled_from([1, 1, 1, 2]),
        priority=st.integers(0, 2),
        salt=st.sampled_from([None, None, "tenant"]),
        with_prompt=st.sampled_from([False, False, True]),
        session=st.sampled_from([None, None, "a", "b"]),
        retention=st.sampled_from([None, None, None, "low", "high"]),
    )
    def add(self, prompt, options, num_answers, num_samples, priority, salt, with_prompt, session, retention):
        ids = prompt.ids()
        if options is not None and not options["star_overlap_size"] and prompt.documents:
            options = options | {"star_segments": prompt.starts()}
        if options is not None and retention is not None:
            options = options | {"star_retention": retention}
        given = {"prompt_token_ids": ids} | ({"cache_salt": salt} if salt else {})
        self._add(given, options or {}, num_answers, num_samples, with_prompt, priority=priority, session_id=session)

    def _add(
        self,
        given: dict[str, Any],
        options: dict[str, Any],
        num_answers: int,
        num_samples: int = 1,
        with_prompt: bool = False,
        **more: Any,
    ) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=num_answers,
            n=num_samples,
            temperature=1 if num_samples > 1 else 0,
            top_k=1 if num_samples > 1 else 0,
            ignore_eos=True,
            logprobs=0,
            output_kind=RequestOutputKind.FINAL_ONLY,
            prompt_logprobs=0 if with_prompt else None,
            extra_args=options or None,
        )
        name = f"r{next(self.numbers)}"
        self.engine.add_request(name, given, params, **more)
        self.asked[name] = Asked(options, num_samples, num_answers)
        self.totals["requests"] += 1
        if "star_segments" in options:
            self.totals["prompts of documents"] += 1
            self.of_documents.append((given, options))

    @precondition(lambda self: self.library is not None and self.of_documents)
    @rule(data=st.data(), num_answers=st.sampled_from([1, 4]))
    def ask_again(self, data, num_answers):
        """Ask for documents again that the library may have, and the engine's own memory does not."""
        self.drain()
        self._reset()
        self._add(*data.draw(st.sampled_from(self.of_documents)), num_answers)
        self.totals["prompts that came again"] += 1

    @precondition(lambda self: self.asked)
    @rule(times=st.integers(1, 6))
    def step(self, times):
        for _ in range(times):
            self._step()

    def _step(self) -> None:
        preempted = {name: request.num_preemptions for name, request in self.scheduler.requests.items()}
        for output in self.engine.step():
            asked = self.asked.get(output.request_id)
            assert asked is not None, f"{output.request_id} is answered after its end"
            if output.finished:
                del self.asked[output.request_id]
                self._compare(output, asked)
        after = self.scheduler.requests
        self.totals["preemptions"] += sum(
            after[name].num_preemptions - before for name, before in preempted.items() if name in after
        )
        self.totals["steps"] += 1

    def _compare(self, output: Any, asked: Asked) -> None:
        """Hold the log-probabilities of an answer against the reference under the request's mask."""
        prompt = list(output.prompt_token_ids)
        assert len(output.outputs) == asked.num_samples
        for answer in output.outputs:
            ids = [*prompt, *answer.token_ids]
            assert len(answer.token_ids) == asked.num_answers, f"{output.request_id}: {answer.finish_reason}"
            expected, follows = self._expected(ids, len(prompt), asked.options)
            chosen = zip(answer.logprobs, answer.token_ids, strict=True)
            got = [step[token].logprob for step, token in chosen]
            assert max_gap(got, expected[-len(got) :]) <= LIMIT, f"{output.request_id} has another answer"
            if output.prompt_logprobs is not None:
                pairs = zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
                got = torch.tensor([step[token].logprob for step, token in pairs])
                gap = max_gap(got[follows].tolist(), expected[: len(got)][follows])
                assert gap <= LIMIT, f"{output.request_id} has another prompt"
        self.totals["compared answers"] += len(output.outputs)
        self.totals["cached tokens"] += output.num_cached_tokens or 0

    def _expected(self, ids: list[int], prompt_tokens: int, options: dict[str, Any]) -> tuple[Any, Any]:
        """The reference's log-probabilities of ``ids[1:]``, and which of ``ids[1:prompt_tokens]`` have one.

        In a prompt of documents, the first token of a block follows no token of the block before it.
        """
        follows = torch.ones(prompt_tokens - 1, dtype=torch.bool)
        starts = options.get("star_segments")
        if starts is None:
            mask = mask_of(star_sizes(options, prompt_tokens), len(ids)) if options else None
            return reference_logprobs(self.model, ids, mask), follows
        size, context_end = options["star_block_size"], prompt_tokens - options["star_query_tokens"]
        pieces = [
            (first, min(first + size, stop))
            for start, stop in pairwise(sorted({0, *starts, context_end}))
            for first in range(start, stop, size)
        ]
        anchor_size = 0
        if starts[0]:
            anchor_size = min(options.get("star_anchor_size", size), pieces[0][1] // PAGE_SIZE * PAGE_SIZE)
        else:
            pieces = [(0, 0), *pieces]  # no head
        follows[[stop - 1 for _, stop in pieces if stop]] = False
        return block_logprobs(self.model, ids, pieces, anchor_size, context_end), follows

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def abort(self, data):
        name = data.draw(st.sampled_from(list(self.asked)))
        self.engine.abort_request([name])
        del self.asked[name]
        self.totals["aborts"] += 1

    @precondition(lambda self: self.scheduler.running)
    @rule(left=st.integers(0, 3), times=st.integers(1, 4))
    def steps_with_few_pages(self, left, times):
        """Running requests that need a page are preempted."""
        pool = self.scheduler.kv_cache_manager.block_pool
        self.taken = pool.get_new_blocks(max(0, pool.get_num_free_blocks() - left))
        self.step(times)
        pool.free_blocks(self.taken)
        self.taken = []

    @rule(preempts=st.booleans(), whole=st.booleans())
    def reset_prefix_cache(self, preempts, whole):
        self._reset(preempts, whole)

    def _reset(self, preempts: bool = False, whole: bool = False) -> None:
        whole = whole and self.library is not None
        done = self.engine.reset_prefix_cache(reset_running_requests=preempts, reset_connector=whole)
        assert done or not preempts or self._coming()

    @precondition(lambda self: self.asked)
    @rule()
    def drain(self):
        for _ in range(600):
            if not self.asked:
                break
            self._step()
        assert not self.asked, f"requests are lost: {list(self.asked)}"
        self._settle()
        check_empty(self.scheduler)
        if self.library is not None:
            check_chunks(self.library.manager)

    def _settle(self) -> None:
        """Report the last ends to the runner, and wait for the copies of pages."""
        self.engine.step()
        for _ in range(1000):
            if not self.scheduler.has_requests():
                return
            self.engine.step()
        raise AssertionError("pages are copied for ever")

    def _coming(self) -> list[int]:
        """The pages that hold what comes from the library."""
        loads = self.scheduler.part(PageLoads)
        return [page.block_id for page in loads.loading.values()] if loads else []

    @invariant()
    def all_pages_are_explained(self):
        check_pages(self.scheduler, [*(page.block_id for page in self.taken), *self._coming()])

    @invariant()
    def no_request_is_lost(self):
        check_queues(self.scheduler, self.engine.output_processor.request_states)

    def teardown(self):
        """Leave the engine empty, after a failure too: the next run has the same engine."""
        try:
            if sys.exc_info()[0] is None:
                self.drain()
            else:
                traceback.print_exc()  # an engine that has failed fails otherwise when its rules are repeated
        finally:
            self.scheduler.kv_cache_manager.block_pool.free_blocks(self.taken)
            self.engine.abort_request(list(self.asked))
            self.engine.step()


def copy_at_once(self: HostWorker, job_id: int, *what: Any) -> bool:
    """Copy pages before a step goes on, so that the same rules always do the same."""
    self.jobs[job_id] = Future()
    self.jobs[job_id].set_result(self._copy(job_id, *what))
    return True


def main() -> None:
    model, library, minutes, seed = sys.argv[1:]
    from vllm import EngineArgs, LLMEngine

    entry = {"scheduler": {"long_prompt_tokens": 100}} | ({} if library == "-" else {"star_library": library})
    arguments = EngineArgs(model=model, additional_config={"starling": entry}, **ENGINE)
    EngineMachine.model = Path(model)
    EngineMachine.engine = LLMEngine.from_engine_args(arguments)
    if library != "-":
        HostWorker._submit = copy_at_once  # type: ignore[method-assign]
        EngineMachine.library = EngineMachine.engine.engine_core.engine_core.scheduler.connector.scheduler
    logging.disable(logging.WARNING)
    length = Length(None if minutes == "-" else float(minutes), None if seed == "-" else int(seed))
    run_machine(EngineMachine, length, runs=5, rules=20)
    print(dict(EngineMachine.totals), flush=True)


if __name__ == "__main__":
    main()
