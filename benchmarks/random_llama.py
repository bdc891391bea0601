"""Random Llama checkpoints for tests and benchmarks: fixed seed, a byte-level tokenizer, no download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each byte of UTF-8, and the end token: 257 in all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)} | {SPECIAL: len(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL, chat_template=CHAT_TEMPLATE)


def make_random_llama(path: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """Write a checkpoint for vLLM and Transformers.

    Args:
        path: directory to make. If it already holds a checkpoint with this configuration and seed, it is left as it is.
        config: LlamaConfig fields; the vocabulary defaults to the byte tokenizer's, padded to 320.

    Returns:
        ``path``.
    """
    stamp = json.dumps({"seed": seed, "dtype": str(dtype)} | config, sort_keys=True)
    marker = path / "starling-made-from.json"
    if marker.exists() and marker.read_text() == stamp:
        return path
    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    fields = {"vocab_size": 320, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None} | config
    model = LlamaForCausalLM(LlamaConfig(**fields))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                # Sharp attention: the scores spread over several units, so that a wrong mask changes the logits.
                scale = 3.0 if ("q_proj" in name or "k_proj" in name) else 1.0
                weight.normal_(0, scale * weight.shape[1] ** -0.5)
    model.to(dtype).save_pretrained(path)
    tokenizer.save_pretrained(path)
    marker.write_text(stamp)
    return path


def make_tiny_llama(path: Path, **config: Any) -> Path:
    """Make a random Llama that answers in milliseconds, for up to 8,192 tokens; ``config`` replaces fields."""
    fields = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
    }
    return make_random_llama(path, **fields | config)
