"""`starling doctor`: a verdict, then what is installed, what works here with a model, and what a prompt would cost.

It starts no engine and no server. With --json, standard output is one JSON object and nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from starling.config.entry import GPU_ATTENTION
from starling.engine_ext.serving.cli.setup_cpu import installation, print_report
from starling.engine_ext.serving.cli.start_checks import refuse_mistakes
from starling.lab.command_line import UNUSABLE
from starling.lab.machine import describe_gpus
from starling.scheduler.planning.facts import FULL_ATTENTION, HYBRID
from starling.vllm_compat import versions
from starling.vllm_compat.config import hybrid_page_size, model_runner, page_size_before_start, plain_message

SAMPLES = {"decode, 1k keys": (1, 1024), "decode, 32k keys": (1, 32_768), "prefill of 2,048 tokens": (2048, 32_768)}
GPU_KERNELS = {"triton": "Starling's Triton kernels", "xformers": "xformers' kernels"}
MOST_MULTIPROCESSORS = 256
"""No GPU has more. Partial results are in proportion to their number."""
SPLITS_NONE = "FlashAttention 3 splits no keys in steps with star rows"
MADE_WITH_THE_WEIGHTS = "the tables of angles are made with the weights, and vLLM's profile counts them"


def attention_backend(config: Any) -> dict[str, str]:
    """Return the attention backend, and why it is used."""
    from starling.attention_backends.paged import NAME
    from starling.attention_backends.star.backend import WRAPPED
    from starling.attention_backends.star.refusals import is_attamba

    if is_attamba(config):
        return {"name": "ATTAMBA", "why": "the layers of an Attamba model attend by themselves"}
    if config.device_config.device_type == "cpu":
        return {"name": "CPU_ATTN", "why": "the CPU platform has no other"}
    chosen = config.attention_config.backend
    if chosen is not None:
        own = chosen.name == NAME
        return {"name": chosen.name, "why": f"{GPU_ATTENTION} names it" if own else "--attention-backend names it"}
    return {"name": "automatic", "why": f"vLLM selects it at its start; Star Attention runs on {', '.join(WRAPPED)}"}


def cuda_graphs(config: Any) -> dict[str, str]:
    """Return the mode of CUDA graphs of the engine, as far as its full-attention layers limit it, and why."""
    from starling.attention_backends.star.backend import graph_support
    from starling.attention_backends.star.refusals import is_attamba, is_made_for_documents, star_refusals
    from starling.vllm_compat.config import resolved_graph_mode

    asked = config.compilation_config.cudagraph_mode
    configured = "NONE" if asked is None else asked.name
    if config.device_config.device_type == "cpu":
        return {"mode": "NONE", "why": "there are none on a CPU"}
    if star_refusals(config) or is_attamba(config):
        return {"mode": configured, "why": "cudagraph_mode; vLLM lowers it at its start where the backend needs it"}
    own_positions = is_made_for_documents(config)
    mode = resolved_graph_mode(config, graph_support(own_positions))
    if mode == configured:
        why = "cudagraph_mode"
    elif own_positions:
        why = f"cudagraph_mode is {configured}, and of steps with documents those of decodes alone run in full graphs"
    else:
        why = f"cudagraph_mode is {configured}, and steps with star rows run in no full graph"
    return {"mode": mode, "why": f"{why}; a model of which no part is compiled has no piecewise graphs"}


def attention_op(config: Any, cpu_attention: str, gpu_attention: str) -> dict[str, str]:
    """Return the attention op of some batches, and why it is used; the settings are the options of these names."""
    from starling.attention_backends.kernels.cpu.build import compiler
    from starling.attention_backends.kernels.cpu.paged_op import Processor, select_op
    from starling.attention_backends.star.refusals import document_refusals, is_attamba, unread_isa

    on_cpu = config.device_config.device_type == "cpu"
    if is_attamba(config):
        kinds = "C++ ops" if compiler() else "torch code: there is no C++ compiler"
        return {"name": "Starling's", "why": f"Attamba's layers run Starling's {kinds if on_cpu else 'Triton kernels'}"}
    if not on_cpu and gpu_attention in GPU_KERNELS:
        return {"name": GPU_KERNELS[gpu_attention], "why": f"{GPU_ATTENTION}={gpu_attention} selects them"}
    if not on_cpu:
        why = "on GPUs the backend's own kernels run, also for star rows"
        if not document_refusals(config):
            why += "; tokens behind documents have Starling's Triton kernels"
        return {"name": "vLLM's", "why": why}
    if cpu_attention == "vllm":
        return {"name": "vLLM's", "why": "cpu_attention=vllm selects it"}
    if compiler() is None:
        return {"name": "vLLM's", "why": "there is no C++ compiler to build Starling's op"}
    if unread_isa(config):
        return {
            "name": "vLLM's",
            "why": "on this processor vLLM lays out bfloat16 keys for AMX, which only its op reads",
        }
    model, parallel = config.model_config, config.parallel_config
    group = model.get_num_attention_heads(parallel) // model.get_num_kv_heads(parallel)
    chosen = {
        batch: select_op(Processor.detect(), model.dtype, queries=queries, keys=keys, group=group).value
        for batch, (queries, keys) in SAMPLES.items()
    }
    return chosen | {"why": "the faster op by benchmarks/kernels/cpu_kernels.py, for this processor and dtype"}


def unprofiled_memory(config: Any) -> dict[str, Any]:
    """Return the most that Starling takes of each GPU beside what vLLM's memory profile has seen, and what for.

    vLLM sizes the KV cache by a profile of the weights and of one dense step. ``gpu_memory_utilization`` has to leave
    room for what comes later. ``bytes`` is None on a CPU.
    """
    from starling.attention_backends.star.head_step import CONTIGUOUS_OUTPUT
    from starling.attention_backends.star.refusals import (
        has_dense_heads,
        is_attamba,
        is_made_for_documents,
        star_refusals,
    )

    if config.device_config.device_type == "cpu":
        return {"bytes": None, "why": "on a CPU vLLM has no memory profile"}
    if star_refusals(config) or is_attamba(config):
        return {"bytes": 0, "why": "no prompt runs star"}
    chosen = config.attention_config.backend
    backend = None if chosen is None else chosen.name
    found = {}
    if backend in (None, "FLASHINFER"):
        found["the page lists of star rows, with FlashInfer"] = page_list_bytes(config)
    if is_made_for_documents(config):
        found["partial results of tokens behind documents, while a layer attends"] = partial_results(config)
        found["the table of decode steps in full CUDA graphs"] = graph_table_bytes(config)
    elif has_dense_heads(config) and (backend is None or backend in CONTIGUOUS_OUTPUT):
        found["a copy of a layer's attention, where heads see different keys"] = output_bytes(config)
    why = [f"{num_bytes:,}: {what}" for what, num_bytes in found.items()] or ["star rows take no more than dense rows"]
    if is_made_for_documents(config):
        why.append(MADE_WITH_THE_WEIGHTS)
    if backend in (None, "FLASH_ATTN"):
        why.append(split_keys(config))
    return {"bytes": sum(found.values()), "why": "; ".join(why)}


def split_keys(config: Any) -> str:
    """Say what FlashAttention 3 takes for the partial results of split keys on a rank, in steps with star rows."""
    mode, model = config.compilation_config.cudagraph_mode, config.model_config
    graph_size = config.compilation_config.max_cudagraph_capture_size or 0
    if mode is None or not mode.has_full_cudagraphs() or not graph_size:
        return SPLITS_NONE
    splits = config.attention_config.flash_attn_max_num_splits_for_cuda_graph
    numbers = splits * graph_size * model.get_num_attention_heads(config.parallel_config) * (model.get_head_size() + 1)
    return (
        f"not counted, as plain vLLM takes it too: {4 * numbers:,} for the keys that FlashAttention 3 splits in a step "
        f"of up to {graph_size:,} tokens; in a longer step with star rows it splits none"
    )


def output_bytes(config: Any) -> int:
    """Return the bytes that the attention of a layer writes on a rank, in a step of the most tokens."""
    model = config.model_config
    heads = model.get_num_attention_heads(config.parallel_config)
    return config.scheduler_config.max_num_batched_tokens * heads * model.get_head_size() * model.dtype.itemsize


def partial_results(config: Any) -> int:
    """Return the most bytes that the kernel of tokens behind documents keeps beside its output, on any GPU."""
    from starling.attention_backends.kernels.triton.paged import rows_that_fill
    from starling.attention_backends.kernels.triton.ranges import PREFILL_LANES, partial_bytes

    model = config.model_config
    kv_heads = model.get_num_kv_heads(config.parallel_config)
    programs = rows_that_fill(MOST_MULTIPROCESSORS, kv_heads)
    return partial_bytes(programs, kv_heads, PREFILL_LANES, model.get_head_size())


def graph_table_bytes(config: Any) -> int:
    """Return the bytes of the table of an engine's full CUDA graphs, where it has such graphs."""
    from starling.attention_backends.kernels.ranges import packed_size
    from starling.attention_backends.star.range_attention import MAX_RANGES

    mode = config.compilation_config.cudagraph_mode
    has_graphs = mode is not None and mode.has_full_cudagraphs()
    return 4 * packed_size(config.scheduler_config.max_num_seqs, MAX_RANGES) if has_graphs else 0


def page_list_bytes(config: Any) -> int:
    """Return the bytes by which FlashInfer's list of pages is longer in an engine that may have star rows."""
    from starling.attention_backends.star.backend import virtual_bounds
    from starling.vllm_compat.config import page_size_before_start

    page_size, longest = page_size_before_start(config), config.model_config.max_model_len
    _, pages = virtual_bounds(config.scheduler_config, longest, page_size)
    return 4 * (pages - config.scheduler_config.max_num_seqs * -(-longest // page_size))


def decode_step(num_tokens: int, cache: dict[str, Any]) -> dict[str, Any]:
    """Return what a step reads for the next token behind a prompt, which sees all: dense, star and with documents.

    Args:
        cache: result of ``kv_cache``; no Attamba's, whose tokens do not see all keys.
    """
    return {"keys": num_tokens, "bytes": num_tokens * cache["bytes_per_token"]}


OK, REFUSED = 0, 1


def verdict(report: dict[str, Any]) -> tuple[list[str], int]:
    """Return (lines, exit code): REFUSED where the server refuses a prompt of the length that was asked about."""
    problem = report["installation"]["problem"]
    if problem is not None:
        return [f"Starling does nothing here: {problem}"], OK
    if "model" not in report:
        vllm = report["installation"]["vllm"]
        return [f"vLLM {vllm} is supported; starling doctor MODEL --prompt-tokens N says what a prompt costs"], OK
    if report["star_refused"]:
        star = f"star: not with this model and these options: {'; '.join(report['star_refused'])}"
    else:
        star = "star: available; --prompt-tokens N says what it saves"
    prompt = report.get("prompt")
    if prompt is None:
        return [star], OK
    tokens = f"{prompt['tokens']:,} tokens"
    if prompt["tokens"] >= prompt["max_model_len"]:
        room = f"the model has {prompt['max_model_len']:,} for prompt and output (max_model_len)"
        return [f"{tokens}: refused, {room}"], REFUSED
    if report["star_refused"]:
        return [star], OK
    ratio = prompt["attention_work_dense_over_star"]
    if prompt["plan_with_star_on"]["attention"] != "star":
        return [f"star: no less attention work at {tokens}: {prompt['plan_with_star_on']['why']}"], OK
    saved = f"star: {ratio:.1f} times less attention work at {tokens}"
    lines = [f"{saved}; loss on your model: not measured, run starling advise"]
    if prompt["by_default"] == "dense":
        lines.append(f"by default such a prompt is dense: {prompt['why']}")
    return lines, OK


def run(argv: Sequence[str]) -> int:
    """Print the report; returns the exit code: 0, 1 for a prompt that is refused, 2 for arguments that are."""
    parser = argparse.ArgumentParser(
        prog="starling doctor",
        description="Shows what is installed and works here; with a model, what Star Attention does and costs, and "
        "which options it refuses.",
        epilog="All options of `starling serve` are accepted behind the model, with the same effect as for the server.",
    )
    parser.add_argument("model", nargs="?", help="a model as `starling serve` takes it; before the server's options")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--prompt-tokens", type=int, metavar="N", help="show plan, memory and work of such a prompt")
    args, serve_options = parser.parse_known_args(argv)
    if args.prompt_tokens is not None and (args.prompt_tokens < 1 or args.model is None):
        parser.error("--prompt-tokens takes a number from 1, and a model")
    if serve_options and (args.model is None or argv.index(serve_options[0]) < argv.index(args.model)):
        parser.error(f"{serve_options[0]} is refused: options of a server come behind a model")
    problem = versions.problem()
    if args.model is not None and problem is not None:
        print(f"starling doctor: error: {problem}", file=sys.stderr)
        return UNUSABLE
    try:
        refuse_mistakes([args.model or "", *serve_options], serves=False)
    except ValueError as error:
        print(f"starling doctor: error: {error}", file=sys.stderr)
        return UNUSABLE
    with reserved_output() as output:
        report: dict[str, Any] = {"machine": describe_gpus(), "installation": installation()}
        if args.model is not None:
            try:
                report |= examine(args.model, serve_options, args.prompt_tokens)
            # vLLM raises RuntimeError where it finds no device, and ImportError where it misses a package.
            except (ValueError, OSError, ImportError, RuntimeError) as error:
                if not args.json:
                    print_report(report, output)
                print(f"starling doctor: error: {plain_message(error)}", file=sys.stderr)
                return UNUSABLE
        lines, code = verdict(report)
        report = {"verdict": lines, **report}
        if args.json:
            print(json.dumps(report, indent=2), file=output)
        else:
            print(*lines, sep="\n", end="\n\n", file=output)
            print_report({name: section for name, section in report.items() if name != "verdict"}, output)
    return code


@contextlib.contextmanager
def reserved_output() -> Iterator[TextIO]:
    """Reserve standard output: what vLLM and its libraries print there goes to standard error."""
    sys.stdout.flush()
    real = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(real, "w", closefd=False) as output:
            yield output
    finally:
        sys.stdout.flush()
        os.dup2(real, 1)
        os.close(real)


def examine(model: str, serve_options: Sequence[str], prompt_tokens: int | None) -> dict[str, Any]:
    """Return what the server would decide for this model.

    Args:
        serve_options: options of `starling serve`.
        prompt_tokens: length of a prompt to show the cost of, or None for no prompt.

    Raises:
        ValueError, OSError: the server would not start.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    from starling.config.entry import config_of
    from starling.config.quality import size_texts
    from starling.engine_ext.front.planning import engine_facts, usable_defaults
    from starling.engine_ext.serving.cli.cpu_host import CORES_ENV, bound_cores, core_binding
    from starling.engine_ext.serving.cli.serve_args import parse
    from starling.engine_ext.serving.grpc.prompt_inputs import chat_params
    from starling.features.adapter.lora import adapter_of
    from starling.scheduler.planning.decide import needs_independent_blocks
    from starling.scheduler.planning.rules import refused_options
    from starling.scheduler.planning.sizes import has_default_overlap

    args, _ = parse([model, *serve_options])
    args.model = model
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    starling = config_of(config)
    assert starling is not None
    cache = kv_cache(config)
    engine = engine_facts(config, cache["page_tokens"])
    refusals = list(engine.refusals)
    star = usable_defaults(starling.star, engine)
    independent = needs_independent_blocks(engine) and not star.dense_heads
    has_overlap = bool(star.overlap_size or star.dense_heads) or has_default_overlap(star, independent=independent)
    sizes = starling.quality_sizes
    report: dict[str, Any] = {
        "model": model,
        "attention_backend": attention_backend(config),
        "attention_op": attention_op(config, starling.cpu_attention, starling.gpu_attention),
        "cuda_graphs": cuda_graphs(config),
        "model_runner": model_runner(config),
        "kv_cache": cache,
        "unprofiled_memory": unprofiled_memory(config),
        "star_defaults": star.model_dump() | {"quality_sizes": sizes and size_texts(sizes)},
        "star_refused": refusals,
        "options_refused": refused_options(star, engine),
        "documents": documents(config, engine.document_refusals),
        "adapter": "none" if (adapter := adapter_of(starling)) is None else adapter.described,
        "star_block_reuse": block_reuse(config, starling.scheduling, refusals, has_overlap),
    }
    if star.segments == "auto":
        report["star_segments"] = messages_as_segments(config, chat_params(args))
    if engine.replicas.size > 1:
        report["replicas"] = replicas_of(engine.replicas, starling, star.shards) | {
            "cores": core_binding(args, os.environ, bound_cores()) or os.environ.get(CORES_ENV, "vLLM's choice")
        }
    if prompt_tokens is not None:
        report["prompt"] = prompt_cost(prompt_tokens, star, cache, engine, config)
    return report


def replicas_of(replicas: Any, starling: Any, shards: str) -> dict[str, Any]:
    """Return how many replicas there are, and what of a prompt can be divided among them.

    Args:
        replicas: the engine's ReplicaSet, of more than one.
        shards: the server's default of ``star_shards``.
    """
    refusal = replicas.split_refusal
    no_shards = "prompts stay on one replica" if refusal else replicas.shards_refusal
    return {
        "number": replicas.size,
        "split": f"no: {refusal}" if refusal else "yes",
        "shards": f"no: {no_shards}" if no_shards else f"yes, with star_shards=on (default {shards})",
        "timeout": starling.replicas.timeout,
    }


def messages_as_segments(config: Any, params: Any) -> str:
    """Return whether the messages of a chat can be segments, with the model's tokenizer and the server's template.

    Args:
        params: vLLM's ChatParams of the server.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.renderers import renderer_from_config

    from starling.engine_ext.front.chat_segments import refusal_of_template

    try:
        refusal = asyncio.run(refusal_of_template(renderer_from_config(config), params))
    except VLLMValidationError as error:
        refusal = str(error.args[0])
    except (ValueError, OSError) as error:
        refusal = str(error)
    return f"auto does not work: {refusal}" if refusal else "auto works: the chat template separates messages"


def documents(config: Any, refusals: Sequence[str]) -> str:
    """Return whether documents are found in the cache wherever they stand, or why not.

    Args:
        refusals: reasons why the engine can't attend to documents.
    """
    if refusals:
        return f"no: {'; '.join(refusals)}"
    if not config.cache_config.enable_prefix_caching:
        return "no: prefix caching is off, so no document is found again. Allowed: --enable-prefix-caching"
    return "yes, star_segments"


def block_reuse(config: Any, scheduling: Any, refusals: list[str], has_overlap: bool) -> str:
    """Return whether star blocks are reused behind an edit, or why not.

    Args:
        has_overlap: True if blocks depend on one another under the server's defaults.
    """
    from starling.features.reuse.core import reuse_refusal

    if refusals or scheduling.star_block_reuse == "off":
        return "no: Star Attention is refused" if refusals else "no: the option scheduler.star_block_reuse is off"
    refusal = reuse_refusal(config)
    if refusal:
        return f"no: {refusal}"
    return "yes, of prompts without an overlap: star_overlap_size=0, or documents" if has_overlap else "yes"


def page_and_token_size(config: Any) -> tuple[int, int]:
    """Return (tokens of a KV page, bytes that a token takes in all attention layers of all ranks)."""
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    kinds = getattr(model.hf_text_config, "layer_types", None) if model.is_hybrid else None
    layers = (
        sum(kind in (*FULL_ATTENTION, HYBRID) for kind in kinds)
        if kinds
        else model.get_num_layers_by_block_type(parallel, "attention") * parallel.pipeline_parallel_size
    )
    dtype = kv_cache_dtype_str_to_dtype(cache.cache_dtype, model)
    ranks = parallel.tensor_parallel_size
    per_layer = 2 * model.get_num_kv_heads(parallel) * ranks * model.get_head_size() * dtype.itemsize
    page_size = hybrid_page_size(config) if model.is_hybrid else page_size_before_start(config)
    return page_size, layers * per_layer


def kv_cache(config: Any) -> dict[str, Any]:
    """Return the sizes of a page and of a token, in all layers of all ranks; for Attamba also its three caches'."""
    page_size, bytes_per_token = page_and_token_size(config)
    specs = attamba_specs(config)
    if not specs:
        page_bytes = page_size * bytes_per_token
        return {"page_tokens": page_size, "page_bytes": page_bytes, "bytes_per_token": bytes_per_token}
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    ranks, layers = config.parallel_config.tensor_parallel_size, config.model_config.hf_config.num_hidden_layers
    page_bytes = specs["states"].page_size_bytes * layers * ranks  # the same in all three
    return {
        "page_tokens": specs["states"].block_size,
        "page_bytes": page_bytes,
        "bytes_per_token": page_bytes / specs["states"].block_size,
        "bytes_per_token_uncompressed": bytes_per_token,
        "groups": {
            name: {
                "page_tokens": spec.block_size,
                "tokens_per_state": spec.tokens_per_state,
                "bytes_per_token": page_bytes / spec.block_size,
                "held_of_a_request": f"its last {spec.sliding_window} tokens"
                if isinstance(spec, SlidingWindowSpec)
                else "the whole text",
            }
            for name, spec in specs.items()
        },
    }


def attamba_specs(config: Any) -> dict[str, Any]:
    """Return the specs of a layer's caches on one rank, by name, for an Attamba model; empty for other models."""
    from starling.engine_ext.models.configs import AttambaConfig

    model = config.model_config.hf_config
    if not isinstance(model, AttambaConfig):
        return {}
    from starling.attention_backends.attamba.cache import layer_specs

    return layer_specs(model, config.model_config.dtype, config.parallel_config.tensor_parallel_size)


def num_pages_held(num_tokens: int, page_size: int, window: int | None) -> int:
    """Return the number of pages that a request of ``num_tokens`` tokens holds for its next token.

    Args:
        window: number of tokens that the next token attends to, itself included, or None for all.
    """
    first = 0 if window is None else max(0, num_tokens - window + 1)
    return -(-num_tokens // page_size) - first // page_size


def prompt_cost(num_tokens: int, star: Any, cache: dict[str, Any], engine: Any, config: Any) -> dict[str, Any]:
    """Return plan, KV memory and attention work of one prompt of text without documents.

    Args:
        star: the server's StarOptions.
        cache: result of ``kv_cache``.
        engine: the server's EngineFacts.

    Raises:
        OptionError: the server would refuse the prompt.
    """
    from starling.config.star import parse_options
    from starling.scheduler.planning.decide import decide
    from starling.scheduler.planning.facts import PromptFacts
    from starling.scheduler.planning.plan import describe

    prompt, has_star = PromptFacts(num_tokens), not engine.refusals
    default = decide(star, None, prompt, engine)
    on = decide(star, parse_options({"star": "on"}), prompt, engine) if has_star else default
    with_star = on.plan
    plan = describe(with_star, num_tokens, config.model_config.hf_text_config, on.why)
    specs = attamba_specs(config)
    sizes = [(spec.block_size, getattr(spec, "sliding_window", None)) for spec in specs.values()] or [
        (cache["page_tokens"], None)
    ]
    num_pages = sum(num_pages_held(num_tokens, *size) for size in sizes)
    ratio = round(plan["dense_keys"] / plan["keys_attended"], 2) if with_star else 1.0
    limit = config.model_config.max_model_len
    return {
        "tokens": num_tokens,
        "max_model_len": limit,
        "accepted": "yes" if num_tokens < limit else f"no: max_model_len is {limit:,}, for prompt and output together",
        "kv_pages": num_pages,
        "kv_bytes": num_pages * cache["page_bytes"],
        "by_default": "dense" if default.plan is None else "star",
        "why": default.why,
        "options_given_by": dict(default.given_by),
        "plan_with_star_on": plan if has_star else None,
        "attention_work_dense_over_star": ratio if has_star else None,
        "decode_step": None if specs else decode_step(num_tokens, cache),
    }
