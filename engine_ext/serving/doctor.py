"""`starling doctor`: what is installed, what works on this machine with this model, what a prompt would cost.

Starts no engine and no server. With --json, standard output holds one JSON object and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from engine_ext import compat, plugin

UNUSABLE = 2
PACKAGES = ("vllm-starling", "torch", "triton", "transformers", "xformers", "grpcio")


def run(argv: Sequence[str]) -> int:
    """Examine and print; returns the exit code: 0, or 2 for arguments that can't be used."""
    parser = argparse.ArgumentParser(
        prog="starling doctor",
        description="What is installed and what works here; with a model, what Star Attention does and costs.",
        epilog="Any option of `starling serve` may follow; it is looked at as the server would.",
    )
    parser.add_argument("model", nargs="?", help="a model as `starling serve` takes it")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--prompt-tokens", type=int, metavar="N", help="show plan, memory and work of such a prompt")
    args, serve_options = parser.parse_known_args(argv)
    if args.prompt_tokens is not None and (args.prompt_tokens < 1 or args.model is None):
        parser.error("--prompt-tokens takes a number from 1, and a model")
    with output_of_our_own() as output:
        report: dict[str, Any] = {"installation": installation()}
        if args.model is not None:
            try:
                report |= examine(args.model, serve_options, args.prompt_tokens)
            except (ValueError, OSError) as error:
                print(f"starling doctor: error: {error}", file=sys.stderr)
                return UNUSABLE
        if args.json:
            print(json.dumps(report, indent=2), file=output)
        else:
            print_report(report, output)
    return 0


@contextlib.contextmanager
def output_of_our_own() -> Iterator[TextIO]:
    """Standard output for us alone: what vLLM and its libraries print there goes to standard error."""
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


def installation() -> dict[str, Any]:
    """Versions, and what of the machine matters."""

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    compiler = shutil.which(os.environ.get("CXX", "g++"))
    notes = [] if compiler else ["no C++ compiler: torch.compile can't run on CPU, serve with --enforce-eager"]
    if version("xformers") is None:
        notes.append("xformers is not installed; it is optional (extra `xformers`)")
    return {
        "python": sys.version.split()[0],
        "vllm": compat.vllm_version(),
        "vllm_supported": compat.VLLM_RANGE,
        **{name: version(name) for name in PACKAGES},
        "compiler": compiler,
        "problem": plugin.problem(),
        "notes": notes,
    }


def examine(model: str, serve_options: Sequence[str], prompt_tokens: int | None) -> dict[str, Any]:
    """What the server would decide for this model (raises ValueError, OSError: as it would refuse to start)."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    from engine_ext.activation import parse_config
    from engine_ext.refusals import fleet, star_refusals
    from engine_ext.serving.cores import CORES_ENV, core_binding
    from engine_ext.serving.serve_args import parse

    args, _ = parse([model, *serve_options])
    args.model = model
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    starling = parse_config(config.additional_config)
    assert starling is not None
    refusals = star_refusals(config)
    cache = kv_cache(config)
    report: dict[str, Any] = {
        "model": model,
        "attention_backend": attention_backend(config),
        "attention_op": attention_op(config, starling.cpu_attention),
        "model_runner": "V2" if config.use_v2_model_runner else "V1",
        "kv_cache": cache,
        "star_defaults": starling.star.model_dump(),
        "star_refused": refusals,
        "star_block_reuse": block_reuse(config, starling.scheduling, refusals),
    }
    replicas = fleet(config)
    if replicas.size > 1:
        why_one = replicas.reason
        report["replicas"] = {
            "number": replicas.size,
            "spread": "yes" if why_one is None else f"no: {why_one}",
            "shards": "no: prompts stay on one replica" if why_one else shards_report(replicas, starling.star),
            "cores": core_binding(args, os.environ) or os.environ.get(CORES_ENV, "vLLM's choice"),
        }
    if prompt_tokens is not None:
        report["prompt"] = prompt_cost(prompt_tokens, starling.star, cache, None if refusals else replicas, config)
    return report


def shards_report(replicas: Any, star: Any) -> str:
    """Whether KV can stay on the replicas that made it, and whether it does by default."""
    return f"no: {replicas.no_shards}" if replicas.no_shards else f"yes, with star_shards=on (default {star.shards})"


def block_reuse(config: Any, scheduling: Any, refusals: list[str]) -> str:
    """Whether star blocks are reused behind an edit, or why not."""
    from scheduler.block_reuse import reuse_obstacle

    if refusals or scheduling.star_block_reuse == "off":
        return "no: Star Attention is refused" if refusals else "no: --scheduler-star-block-reuse off"
    obstacle = reuse_obstacle(config)
    return f"no: {obstacle}" if obstacle else "yes"


def page_size(config: Any) -> tuple[int, int]:
    """(tokens of a KV page, bytes a token takes in all attention layers of all ranks together)."""
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    layers = model.get_num_layers_by_block_type(parallel, "attention")
    dtype = kv_cache_dtype_str_to_dtype(cache.cache_dtype, model)
    ranks = parallel.tensor_parallel_size
    per_layer = 2 * model.get_num_kv_heads(parallel) * ranks * model.get_head_size() * dtype.itemsize
    return cache.block_size, layers * parallel.pipeline_parallel_size * per_layer


def kv_cache(config: Any) -> dict[str, Any]:
    """Pages, and bytes that each token adds, of all layers and ranks together; of Attamba's three caches each its own.

    Tokens in 1 GiB a rank are what vLLM would report at start: requests of max_model_len, with room for the tokens of
    a step in each; beside them those of the same layers with a K and V for every token.
    """
    page, bytes_per_token = page_size(config)
    specs = attamba_specs(config)
    if not specs:
        return {"page_tokens": page, "page_bytes": page * bytes_per_token, "bytes_per_token": bytes_per_token}
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    from attention_backends.attamba.cache import model_specs

    model, dtype = config.model_config.hf_config, config.model_config.dtype
    ranks, layers = config.parallel_config.tensor_parallel_size, model.num_hidden_layers
    page_bytes = specs["states"].page_size_bytes * layers * ranks  # the same in all three
    heads = model.num_attention_heads // ranks
    plain = FullAttentionSpec(block_size=16, num_kv_heads=heads, head_size=model.head_dim, dtype=dtype)
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
        "tokens_in_1_gib": _tokens_in(config, model_specs(model, dtype, ranks)),
        "tokens_in_1_gib_uncompressed": _tokens_in(config, {f"layers.{layer}": plain for layer in range(layers)}),
    }


def attamba_specs(config: Any) -> dict[str, Any]:
    """The caches of a layer of an Attamba model, on one rank; none for other models."""
    from engine_ext.models.attamba_config import AttambaConfig

    model = config.model_config.hf_config
    if not isinstance(model, AttambaConfig):
        return {}
    from attention_backends.attamba.cache import cache_specs

    local = model.hidden_size // config.parallel_config.tensor_parallel_size
    return cache_specs(model.token_chunk, model.leading_tokens, model.hidden_size, local, config.model_config.dtype)


def pages_held(num_tokens: int, page: int, window: int | None) -> int:
    """Pages that hold what the next token needs of so many tokens: all, or with itself the last ``window``."""
    first = 0 if window is None else max(0, num_tokens - window + 1)
    return -(-num_tokens // page) - first // page


def _tokens_in(config: Any, specs: dict[str, Any], available: int = 1 << 30) -> int | None:
    """Tokens of a cache of so many bytes a rank; None where not one request of max_model_len fits."""
    try:
        return compat.kv_cache_capacity(config, specs, available)
    except ValueError:
        return None


def attention_backend(config: Any) -> dict[str, str]:
    """Which backend attends, and why."""
    from attention_backends.star.backend import WRAPPED

    if config.device_config.device_type == "cpu":
        return {"name": "CPU_ATTN", "why": "the only one of the CPU platform"}
    chosen = config.attention_config.backend
    if chosen is not None:
        return {"name": chosen.name, "why": "--attention-backend names it"}
    return {"name": "automatic", "why": f"vLLM picks at start; Star Attention runs on {', '.join(WRAPPED)}"}


SAMPLES = {"decode, 1k keys": (1, 1024), "decode, 32k keys": (1, 32_768), "prefill of 2,048 tokens": (2048, 32_768)}


def attention_op(config: Any, setting: str) -> dict[str, str]:
    """Which kernel attends in some batches, and why."""
    if config.device_config.device_type != "cpu":
        return {"name": "vLLM's", "why": "on GPUs the backend's own kernels run, star rows and all"}
    from attention_backends.kernels.build import compiler
    from attention_backends.kernels.choose import Processor, choose

    if setting == "vllm":
        return {"name": "vLLM's", "why": "--cpu-attention vllm asks for it"}
    if compiler() is None:
        return {"name": "vLLM's", "why": "there is no C++ compiler to build Starling's with"}
    model, parallel = config.model_config, config.parallel_config
    group = model.get_num_attention_heads(parallel) // model.get_num_kv_heads(parallel)
    chosen = {
        batch: choose(Processor.here(), model.dtype, queries=queries, keys=keys, group=group).value
        for batch, (queries, keys) in SAMPLES.items()
    }
    return chosen | {"why": "the faster one by benchmarks/cpu_kernels.py, for this processor and dtype"}


def prompt_cost(num_tokens: int, star: Any, cache: dict[str, Any], replicas: Any, config: Any) -> dict[str, Any]:
    """Plan, KV memory and attention work of one prompt (raises OptionError: it would be refused).

    ``replicas`` is the server's Fleet; None where star is refused.
    """
    from engine_ext.refusals import star_page
    from engine_ext.requests import describe
    from scheduler.options import StarOptions
    from scheduler.plan import ONE_ENGINE, make_plan

    fleet = replicas or ONE_ENGINE
    as_asked = None if replicas is None else make_plan(num_tokens, star, None, star_page(config), fleet)
    star_on = StarOptions(**(star.model_dump(exclude_unset=True) | {"mode": "on"}))
    if_on = make_plan(num_tokens, star_on, None, star_page(config), fleet)
    assert if_on is not None
    told = describe(if_on, num_tokens, config.model_config.hf_text_config)
    caches = attamba_specs(config).values()
    sizes = [(spec.block_size, getattr(spec, "sliding_window", None)) for spec in caches] or [
        (cache["page_tokens"], None)
    ]
    pages = sum(pages_held(num_tokens, *size) for size in sizes)
    return {
        "tokens": num_tokens,
        "kv_pages": pages,
        "kv_bytes": pages * cache["page_bytes"],
        "by_default": "dense" if as_asked is None else "star",
        "plan_with_star_on": None if replicas is None else told,
        "attention_work_dense_over_star": None
        if replicas is None
        else round(told["dense_keys"] / told["keys_attended"], 2),
    }


def print_report(report: dict[str, Any], output: TextIO) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(file=output)
    for section, content in report.items():
        table = Table(show_header=False, title=section.replace("_", " "), title_justify="left", min_width=60)
        for key, value in (content if isinstance(content, dict) else {"": content}).items():
            table.add_row(key.replace("_", " "), _shown(value))
        console.print(table)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return "\n".join(f"{key.replace('_', ' ')}: {_shown(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "\n".join(map(str, value)) or "nothing"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
