"""Run in a process of its own: decode steps of documents as full CUDA graphs replay them, against the explicit mask.

A graph keeps what its capture launched, with the tensors of the capture. So a layer runs once more with the metadata
that ``build_for_cudagraph_capture`` returned, over the tensors that it saw then, after the metadata of another step was
built. vLLM's own builders and implementations run; Starling's Triton kernels are interpreted. Prints a JSON line.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from tests.gpu_contract.cuda_platform import use_cuda_platform

PLATFORM = use_cuda_platform()

import torch  # noqa: E402
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata  # noqa: E402

from starling.attention_backends.kernels import contract  # noqa: E402
from starling.attention_backends.star import backend as star_backend  # noqa: E402
from starling.attention_backends.star import range_attention  # noqa: E402
from starling.attention_backends.star.document_step import DocumentStep  # noqa: E402
from starling.attention_backends.star.step import StarStep, open_step, set_positions  # noqa: E402
from starling.scheduler.planning.plan import StarPlan  # noqa: E402
from tests.gpu_contract import kernels  # noqa: E402
from tests.gpu_contract.cases import HEAD_SIZE, Case, Request, expected, numbers  # noqa: E402
from tests.gpu_contract.engine import LayerGroup, batch_fields, make_config  # noqa: E402

PAGE_SIZE, ROWS, CASES = 16, 5, 6


def random_request(draw: random.Random) -> Request:
    """A token that decodes: of a prompt over documents, of a dense one, or of a star prompt behind its context."""
    kind = draw.choice(("documents", "documents", "dense", "star"))
    if kind != "documents":
        end = draw.randint(2, 300)
        return Request(end - 1, end, None if kind == "dense" else StarPlan(32, 16, 0, end // 2, end // 2 + 1))
    blocks, start = [], 0
    for length in [draw.randint(1, 60) for _ in range(draw.randint(2, 6))]:
        blocks.append((start, start + length))
        start += -(-length // PAGE_SIZE) * PAGE_SIZE
    plan = StarPlan(64, draw.choice((0, 0, min(blocks[0][1] // PAGE_SIZE, 1) * PAGE_SIZE)), 0, start, start + 9,
                    documents=tuple(blocks))  # fmt: skip
    end = plan.num_prompt_tokens + draw.randint(1, 20)
    return Request(end - 1, end, plan)


@dataclass
class Graph:
    """The tensors that a captured layer reads, of ROWS rows; what is behind a step's rows is left from earlier ones."""

    block_table: torch.Tensor
    starts: torch.Tensor
    seq_lens: torch.Tensor
    query: torch.Tensor
    out: torch.Tensor


def capture(case: Case, group: LayerGroup) -> tuple[Graph, Any]:
    """The graph of a batch of ROWS decodes of a dummy run, and its metadata."""
    columns = group.block_table().shape[1]
    graph = Graph(
        torch.zeros(ROWS, columns, dtype=torch.int32),
        torch.arange(ROWS + 1, dtype=torch.int32),
        torch.ones(ROWS, dtype=torch.int32),
        torch.zeros(ROWS, case.heads, HEAD_SIZE),
        torch.zeros(ROWS, case.heads, HEAD_SIZE),
    )
    fields = {
        "num_reqs": ROWS,
        "num_tokens": ROWS,
        "query_start_loc_cpu": graph.starts.clone(),
        "max_query_len": 1,
        "max_seq_len": 1,
        "seq_lens_cpu_upper_bound": graph.seq_lens.clone(),
        "is_prefilling": torch.zeros(ROWS, dtype=torch.bool),
        "for_cudagraph_capture": True,
    }
    return graph, build(graph, group, torch.full((ROWS,), -1), fields)


def build(graph: Graph, group: LayerGroup, slots: torch.Tensor, fields: dict[str, Any]) -> Any:
    given = {"query_start_loc_gpu": graph.starts, "seq_lens": graph.seq_lens, "block_tables": [graph.block_table]}
    return build_attn_metadata(
        attn_groups=[[group.group]],
        slot_mappings=slots[None],
        kv_cache_config=SimpleNamespace(kv_cache_groups=[group]),
        **fields | given,
    )[group.name]


def replay(case: Case, graph: Graph, group: LayerGroup, metadata: Any) -> float:
    """Run a step by the graph. Returns the largest difference from the explicit mask."""
    drawn, fields = numbers(case, False), batch_fields(case)
    group._fill(drawn)
    rows = len(case.requests)
    graph.block_table.copy_(group.block_table()[:ROWS])
    graph.starts.copy_(fields["query_start_loc_gpu"])
    graph.seq_lens.copy_(fields["seq_lens"])
    graph.query[:rows], graph.out[:] = drawn.queries[:rows], float("nan")
    names = [str(index) for index in range(rows)]
    plans = {name: one.plan for name, one in zip(names, case.requests, strict=True) if one.plan and one.plan.documents}
    step = StarStep(plans, dict.fromkeys(names, 1), lambda: names, lambda rows: None, DocumentStep())
    with open_step(step if plans else None):
        build(graph, group, group.slot_mapping(), fields)
        set_positions(torch.zeros(ROWS, dtype=torch.int64))
    group.impl.forward(group.layer, graph.query, None, None, group.cache, metadata, graph.out)
    assert graph.out[rows:].isnan().all(), "an output of padding was written"
    return (graph.out[:rows].double() - expected(case, drawn)).abs().max().item()


def main() -> None:
    torch.set_num_threads(1)
    name = sys.argv[1]
    if name == "flash_attention":
        torch.cuda.get_device_capability = lambda device=None: (9, 0)
        kernels.install_flash_attention()
        from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend as Backend
    else:
        from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend as Backend
    contract.uses_triton = lambda device: True
    launches: list[int] = []
    attend = range_attention.attend_in_ranges
    range_attention.attend_in_ranges = lambda *args, **options: (launches.append(1), attend(*args, **options))
    virtual: list[int] = []
    make_virtual = star_backend.virtual_metadata
    star_backend.virtual_metadata = lambda batch, rows: (virtual.append(1), make_virtual(batch, rows))[1]
    worst, counts = 0.0, {"documents": 0, "dense": 0, "padded": 0}
    draw = random.Random(0)
    for seed in range(CASES):
        batch = [random_request(draw) for _ in range(ROWS)]
        if seed == CASES - 1:  # a step without documents, of an engine that is made for them
            batch = [Request(one.end - 1, one.end) for one in batch]
        case = Case(tuple(batch), PAGE_SIZE, PAGE_SIZE, "LBNHC", 2, 2, seed=seed)
        config = make_config(case)
        group = LayerGroup(case, Backend, config, numbers(case, False), 0, by_parts=True)
        group.create_builder(config)
        group.layer.kv_cache = group.cache
        launched = len(launches)
        graph, metadata = capture(case, group)
        assert len(launches) > launched, "a kernel that is captured is loaded before"
        group.impl.forward(group.layer, graph.query, None, None, group.cache, metadata, graph.out)
        worst = max(worst, replay(case, graph, group, metadata))
        rows = draw.randint(1, ROWS - 1)  # the others have ended: the graph is padded, and has numbers of theirs
        group.case = replace(case, requests=case.requests[:rows], padding=ROWS - rows)
        group.page_ids = group.page_ids[:rows]
        worst = max(worst, replay(group.case, graph, group, metadata))
        counts["padded"] += 1
        for one in batch:
            counts["documents" if one.plan and one.plan.documents else "dense"] += 1
    assert not virtual, "metadata was built that no layer of a graph reads"
    print(json.dumps({"job": f"graphs, {name}", "cases": CASES, "worst": worst, **counts}))
