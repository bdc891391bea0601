"""Retrieval by a constructed model up to 131,072 tokens: `python -m benchmarks.retrieval`.

The model is not trained: its weights are written down so that each answer can be worked out by hand. It is a Llama of
two layers with one head each, an induction head. Layer 1 attends to the token before, and notes which one that was.
Layer 2 attends to the position whose note is the token at hand, and copies the token there. So after a key, the model
says the value that followed the key earlier in the prompt, at any distance.

A prompt has 40 keys with their values, at depths over the whole context. Each key is asked for, under dense attention
and under each star plan. By the definition of Star Attention an answer is right if the value sees the key before it in
phase 1, since the question sees the whole prompt in phase 2. Eight values are the first token of a sixteenth of the
prompt, where a block without an overlap may not see the token before. Writes results/retrieval.json, which
docs/star-accuracy.md shows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.engine import ROOT
from benchmarks.random_llama import byte_tokenizer
from benchmarks.report import markdown_table, write_json
from starling.lab.evaluation.client import Client
from starling.lab.evaluation.prompt_options import DENSE, Plan
from starling.lab.evaluation.server_process import served

HEAD, PAIRS = 128, 64
THETA, ROTATED = 1e20, 20
"""RoPE rotates the first 20 pairs of dimensions by 1 to 1e-6 per position. At 131,072 tokens, it has rotated each of
the other pairs by at most 0.08, so these hold the codes of tokens, whose products do not depend on the distance."""

KEYS, VALUES, FILLERS = range(40), range(40, 64), range(64, 88)
VOCABULARY = 320  # as many as the tokenizer has, in whole units of vLLM's padding
PREVIOUS, MATCH = 50.0, 60.0
"""Scores: of a pair of dimensions at the token before, and of a key's code. The token itself, the next best to the
token before, scores 0.61 * PREVIOUS less. At 131,072 tokens a sum over all others then has e^-30 and e^-48 of the
weight."""

STRATA, BORDERS = 32, (1, 2, 3, 4, 6, 8, 11, 14)


@dataclass(frozen=True)
class Needle:
    """A key and the value after it. ``position`` is the value's; the key's is one less."""

    key: int
    value: int
    position: int


def token_dimensions() -> torch.Tensor:
    """Return (tokens that have a code,) the dimension of each token's code. RoPE pairs dimension i with 64 + i."""
    fixed = torch.arange(ROTATED, PAIRS)
    return torch.cat((fixed, PAIRS + fixed))


def model_tensors() -> dict[str, torch.Tensor]:
    """Return the tensors of the LlamaForCausalLM checkpoint, by name.

    The hidden state has three parts of 128 dimensions: the code of the token, of the token before, and of the answer.
    """
    dimensions = token_dimensions()
    codes = torch.zeros(VOCABULARY, HEAD)
    codes[torch.arange(len(dimensions)), dimensions] = 1.0
    hidden, unit, none = 3 * HEAD, torch.eye(HEAD), torch.zeros(HEAD, HEAD)
    one_code = hidden**0.5  # the length of a code after RMSNorm, if the hidden state has no other; of two, over sqrt(2)
    angles = THETA ** -(torch.arange(ROTATED, dtype=torch.float64) / PAIRS)
    here, before = torch.zeros(HEAD), torch.zeros(HEAD)
    here[:ROTATED] = 1.0
    before[:ROTATED], before[PAIRS : PAIRS + ROTATED] = angles.cos().float(), -angles.sin().float()
    any_token = codes.sum(0)[None, :]  # every code's product with it is 1

    def attention(query: torch.Tensor, key: torch.Tensor, out: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        first = [unit, none, none]  # both layers copy the token at the position that they attend to
        return {
            "q_proj": query,
            "k_proj": key,
            "v_proj": torch.cat(first, 1),
            "o_proj": torch.cat(out, 0),
        }

    sharp = PREVIOUS * HEAD**0.5 / one_code**2
    layers = [
        attention(
            torch.cat((sharp * before[:, None] * any_token, none, none), 1),
            torch.cat((here[:, None] * any_token, none, none), 1),
            [none, unit / one_code, none],
        ),
        attention(
            torch.cat((2 * MATCH * HEAD**0.5 / one_code**2 * unit, none, none), 1),
            torch.cat((none, unit, none), 1),
            [none, none, unit],
        ),
    ]
    tensors = {
        "model.embed_tokens.weight": torch.cat((codes, torch.zeros(VOCABULARY, 2 * HEAD)), 1),
        "lm_head.weight": torch.cat((torch.zeros(VOCABULARY, 2 * HEAD), codes), 1),
        "model.norm.weight": torch.ones(hidden),
    }
    for index, projections in enumerate(layers):
        layer = f"model.layers.{index}"
        tensors |= {f"{layer}.self_attn.{name}.weight": weight for name, weight in projections.items()}
        tensors |= {f"{layer}.mlp.{name}_proj.weight": torch.zeros(1, hidden) for name in ("gate", "up")}
        tensors |= {f"{layer}.mlp.down_proj.weight": torch.zeros(hidden, 1)}
        tensors |= {f"{layer}.{name}_layernorm.weight": torch.ones(hidden) for name in ("input", "post_attention")}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def make_retrieval_model(path: Path, max_tokens: int) -> Path:
    """Write the checkpoint to a folder; returns the folder. Its tokenizer has no part in the answers."""
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 3 * HEAD,
        "intermediate_size": 1,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": HEAD,
        "max_position_embeddings": max_tokens,
        "rope_theta": THETA,
        "rms_norm_eps": 1e-12,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    save_file(model_tensors(), path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config, indent=1))
    byte_tokenizer().save_pretrained(path)
    return path


def make_context(num_tokens: int) -> tuple[list[int], list[Needle]]:
    """Make a prompt of fillers with 40 needles, of which each has its own key.

    32 lie within the 32nds of the prompt, and eight have their value at the start of a 16th.
    """
    draw, stratum = random.Random(num_tokens), num_tokens // STRATA
    positions = [index * stratum + draw.randrange(stratum // 8, stratum // 2) for index in range(STRATA)]
    positions += [border * num_tokens // 16 for border in BORDERS]
    keys = draw.sample(KEYS, len(KEYS))
    needles = [Needle(key, draw.choice(VALUES), position) for key, position in zip(keys, positions, strict=True)]
    ids = [draw.choice(FILLERS) for _ in range(num_tokens)]
    for needle in needles:
        ids[needle.position - 1 : needle.position + 1] = [needle.key, needle.value]
    return ids, needles


def is_found(position: int, sizes: dict[str, Any] | None) -> bool:
    """Return whether the value at ``position`` sees the key before it: the definition of Star Attention.

    Args:
        sizes: block_size, anchor_size, overlap_size and context_end of the plan, or None for dense attention.
    """
    key = position - 1
    if sizes is None or position >= sizes["context_end"]:
        return True
    start = position // sizes["block_size"] * sizes["block_size"]
    return key >= start - sizes["overlap_size"] or key < sizes["anchor_size"]


def make_plans(num_tokens: int) -> list[Plan]:
    """Return the plans: dense, Starling's default, and the paper's A = B with n/B of 4, 8 and 16."""
    paper = {"star": "on", "star_overlap_size": 0}
    parts = (4, 8, 16)
    return [
        DENSE,
        Plan("default", {"star": "on"}),
        *(Plan(f"A = B = n/{part}", paper | {"star_block_size": num_tokens // part}) for part in parts),
    ]


async def measure(client: Client, num_tokens: int, plan: Plan) -> dict[str, Any]:
    """Ask for each key. The context is computed once: later questions find it in the prefix cache.

    Raises:
        ServerError: star did not run.
    """
    ids, needles = make_context(num_tokens)
    expected, agreed, wrong, sizes = 0, 0, [], None
    for needle in needles:
        answer = await client.complete([*ids[:-1], needle.key], plan, 1)
        sizes = None if plan.is_dense else answer.plan
        found, right = is_found(needle.position, sizes), answer.token_ids == [needle.value]
        expected, agreed = expected + found, agreed + (found == right)
        wrong += [] if right else [needle.position]
    kept = ("block_size", "anchor_size", "overlap_size", "context_end", "keys_attended", "dense_keys")
    return {
        "tokens": num_tokens,
        "plan": plan.name,
        "sizes": sizes and {name: sizes[name] for name in kept},
        "questions": len(needles),
        "right": len(needles) - len(wrong),
        "expected_right": expected,
        "as_expected": agreed,
        "wrong_positions": sorted(wrong),
    }


def markdown(result: dict[str, Any]) -> str:
    """Return a table, whose right answers docs/star-accuracy.md has."""
    rows = []
    for row in result["rows"]:
        sizes = row["sizes"]
        work = 100 * sizes["keys_attended"] / sizes["dense_keys"] if sizes else 100
        of = row["questions"]
        numbers = [f"{row[field]} of {of}" for field in ("right", "expected_right", "as_expected")]
        rows.append([f"{row['tokens']:,}", row["plan"], f"{work:.0f} %", *numbers])
    head = ("prompt tokens", "plan", "attention work", "right answers", "right by definition", "questions as defined")
    return markdown_table(head, rows)


async def measure_all(base_url: str, lengths: list[int]) -> list[dict[str, Any]]:
    """Return a row for each length and plan."""
    rows = []
    async with Client(base_url, timeout=3600) as client:
        for length in lengths:
            for plan in make_plans(length):
                rows.append(await measure(client, length, plan))
                print(rows[-1], flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[131072], help="tokens of a prompt (%(default)s)")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="more options of `starling serve`")
    args = parser.parse_args()
    unit = 16 * 128  # star blocks of n/16 are whole pages
    for length in args.lengths:
        if length % unit or not 8192 <= length <= 131072:
            parser.error(f"--lengths {length} is refused. Allowed: multiples of {unit} from 8192 to 131072.")
    longest = max(args.lengths) + 1
    options = ["--dtype", "float32", "--max-model-len", str(longest), "--kv-cache-memory-bytes", str(1 << 30)]
    options += ["--enforce-eager", "--block-size", "128", "--max-num-batched-tokens", "2048", "--star", "off"]
    with tempfile.TemporaryDirectory() as folder:
        model = str(make_retrieval_model(Path(folder) / "retrieval", longest))
        log = ROOT / "benchmarks" / "out" / "retrieval" / "server.log"
        with served(model, [*options, "--served-model-name", "retrieval", *args.serve], log) as base_url:
            result = {"rows": asyncio.run(measure_all(base_url, args.lengths))}
    path = write_json("retrieval", result)
    print(markdown(result))
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
