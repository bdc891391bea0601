"""Prompts for models with KV shifting attention, and their log-probabilities by the float32 reference."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.kv_shift.random_model import make_random_kv_shift
from tests.parity.harness import mask_of, max_gap, star_sizes
from tests.references.kv_shift import logits

NEW = 5
RANK = 8


def random_ids(seed: int, length: int) -> list[int]:
    tokens = random.Random(seed)
    return [tokens.randrange(256) for _ in range(length)]


def uncached_prompt(ids: list[int], options: dict | None = None, **more: Any) -> dict:
    """A prompt that skips the prefix cache: the result has logprobs of its own tokens and of the generated tokens."""
    return {"ids": ids, "extra_args": options or {}, "prompt_logprobs": True, "max_tokens": NEW} | more


def cached_prompt(ids: list[int], options: dict | None = None, **more: Any) -> dict:
    """A prompt that reads the prefix cache: the result has logprobs of the generated tokens only."""
    return uncached_prompt(ids, options, prompt_logprobs=False, **more)


@dataclass(frozen=True)
class Model:
    """A checkpoint on disk, with its configuration and tensors for the reference."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @classmethod
    def random(cls, path: Path, config: dict[str, Any]) -> Model:
        """Make a random checkpoint at ``path``."""
        make_random_kv_shift(path, config)
        return cls(path, json.loads((path / "config.json").read_text()), load_file(path / "model.safetensors"))

    def adapted(self, folder: Path) -> Model:
        """Write a LoRA adapter of every attention projection; returns the model with merged weights."""
        torch.manual_seed(1)
        merged, adapter = dict(self.tensors), {}
        for name, tensor in self.tensors.items():
            if ".self_attn." in name and name.endswith((".W_pack.weight", "_proj.weight")):
                rows, columns = tensor.shape
                down, up = torch.randn(RANK, columns) * columns**-0.5, torch.randn(rows, RANK) * 0.3
                module = f"base_model.model.{name.removesuffix('.weight')}"
                adapter |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
                merged[name] = tensor + up @ down
        folder.mkdir()
        save_file(adapter, folder / "adapter_model.safetensors")
        targets = sorted({name.split(".")[-3] for name in adapter})
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": targets, "bias": "none"}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return replace(self, tensors=merged)

    def logprobs(self, prompt: dict, new: list[int], dense: bool = False) -> torch.Tensor:
        """Log-probabilities of all tokens except the first, under the prompt's star mask unless ``dense``.

        Args:
            new: generated tokens.
        """
        ids, options = prompt["ids"] + new, prompt["extra_args"]
        mask = mask_of(star_sizes(options, len(prompt["ids"])), len(ids)) if options and not dense else None
        logprobs = logits(self.config, self.tensors, ids, mask)[:-1].log_softmax(-1)
        return logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]

    def gap(self, prompt: dict, output: dict) -> float:
        """Largest difference of the engine's logprobs from the reference, over all tokens that have a logprob."""
        expected = self.logprobs(prompt, output["token_ids"])
        got = (output["prompt_logprobs"] or []) + output["logprobs"]
        return max_gap(got, expected[-len(got) :])


def zero_state(worker: Any) -> None:
    """In a worker: from now on the first token of every chunk has no predecessor."""
    from starling.attention_backends.kv_shift import shift, state

    find = state.find_predecessors

    def without_predecessors(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        rows, slots = find(*args)
        return rows, torch.full_like(slots, shift.NO_SLOT)

    state.find_predecessors = without_predecessors
