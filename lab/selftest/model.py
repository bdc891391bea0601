"""Random Llamas, and log-probabilities under an explicit mask by Transformers."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from starling.config.adapter import DISTILLED, PEFT_CONFIG, VERSION, WEIGHTS
from starling.config.head_scores import HeadScores
from starling.lab.selftest.masks import Heads, masks_by_head

TINY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
VOCABULARY = 320
# For times of long prompts: attention takes most of a prefill, as in a real model.
SMALL = TINY | {
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "max_position_embeddings": 1 << 18,
}
LLAMA_1B = SMALL | {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
LLAMA_8B = LLAMA_1B | {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32}
TIMED = ((60, "Llama-3.1-8B", LLAMA_8B), (20, "Llama-3.2-1B", LLAMA_1B), (0, "a small Llama", SMALL))
"""GiB of a GPU that a model takes with 128k tokens in its KV cache, the name of its shape, and LlamaConfig fields."""
ADAPTED = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose linear layers have the names and shapes of a Llama's."""
ADAPTER_RANK = 8  # that of `starling distil`
MAX_REFERENCE_BYTES = 8 << 30
"""Checkpoints above this size get no float32 reference, which runs on the CPU."""


def timed_shape(memory: int) -> tuple[str, dict[str, int]]:
    """Return the largest model for times that fits into a GPU's memory: the name of its shape, LlamaConfig fields.

    Args:
        memory: memory of the GPU, in bytes.
    """
    return next((name, sizes) for gib, name, sizes in TIMED if memory >= gib << 30)


def make_config(path: Path, dtype: torch.dtype, sizes: dict[str, int]) -> Any:
    """Write the configuration of a Llama without a tokenizer to a folder; returns the LlamaConfig.

    Args:
        sizes: LlamaConfig fields.
    """
    from transformers import LlamaConfig

    settings = LlamaConfig(**{"vocab_size": VOCABULARY} | sizes, bos_token_id=None, eos_token_id=None)
    settings.architectures, settings.dtype = ["LlamaForCausalLM"], dtype
    path.mkdir(parents=True, exist_ok=True)
    settings.save_pretrained(path)
    return settings


def make_model(path: Path, dtype: torch.dtype, sizes: dict[str, int]) -> Path:
    """Write a random checkpoint with a fixed seed and without a tokenizer; returns ``path``.

    Args:
        sizes: LlamaConfig fields.
    """
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    settings = make_config(path, dtype, sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(settings)
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                # Sharp attention: the scores spread over units, so that a wrong mask changes the logits.
                scale = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
                torch.nn.init.normal_(weight, 0, scale * weight.shape[1] ** -0.5)
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def vocabulary(model: str) -> int:
    """Return the number of entries of a model's vocabulary."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model).get_text_config().vocab_size


def max_length(model: str) -> int:
    """Return the longest prompt with its output for which vLLM starts a model, in tokens.

    The length is by vLLM's own reading of the model's config.

    Raises:
        ValueError, OSError: vLLM can't serve the model.
    """
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=model, skip_tokenizer_init=True).create_model_config().max_model_len


def alternating_scores(model: str) -> HeadScores:
    """Return scores with which every second KV head of each full-attention layer comes first."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    row = tuple(float(head % 2 == 0) for head in range(heads))
    return HeadScores(scores=tuple(row if kind == "full_attention" else () for kind in kinds))


def adapter_refusal(model: str) -> str | None:
    """Return why ``zero_adapter`` makes no adapter of a model, or None if it does."""
    from transformers import AutoConfig

    kind = AutoConfig.from_pretrained(model).model_type
    return None if kind in ADAPTED else f"an adapter of zeros is made for {', '.join(ADAPTED)}, and this is {kind}"


def zero_adapter(folder: Path, model: str) -> Path:
    """Write an adapter for documents that changes all linear layers by zero, as `starling distil` does.

    Returns its folder.

    Args:
        model: model for which ``adapter_refusal`` returns None.
    """
    from safetensors.torch import save_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or hidden // heads
    queries, keys = heads * size, config.num_key_value_heads * size
    shapes = {  # rows, columns
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    weights = {}
    for layer in range(config.num_hidden_layers):
        for name, (rows, columns) in shapes.items():
            base = f"base_model.model.model.layers.{layer}.{name}"
            weights[f"{base}.lora_A.weight"] = torch.ones(ADAPTER_RANK, columns, dtype=torch.bfloat16)
            weights[f"{base}.lora_B.weight"] = torch.zeros(rows, ADAPTER_RANK, dtype=torch.bfloat16)
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    modules = sorted(name.rpartition(".")[2] for name in shapes)
    peft = {"peft_type": "LORA", "r": ADAPTER_RANK, "lora_alpha": ADAPTER_RANK, "target_modules": modules}
    (folder / PEFT_CONFIG).write_text(json.dumps(peft | {"bias": "none"}))
    made = {"version": VERSION, "purposes": ["documents"], "model": str(model)}
    (folder / DISTILLED).write_text(json.dumps(made))
    return folder


def reference_refusal(model: str) -> str | None:
    """Return why there is no float32 reference for a checkpoint, or None if there is one."""
    if not Path(model).is_dir():
        return "the reference needs a checkpoint in a local folder"
    size = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
    if size > MAX_REFERENCE_BYTES:
        return f"a float32 reference of {size / 2**30:.0f} GiB of weights takes too long on the CPU"
    return None


@functools.lru_cache(maxsize=1)
def load_reference(model: str) -> Any:
    """Load Transformers' own model in float32 with eager attention. It shares no code with vLLM and Starling."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()


def reference_logprobs(model: str, ids: list[int], mask: torch.Tensor, dense_heads: Heads = ()) -> torch.Tensor:
    """Return (len(ids) - 1,) log-probability of each of ``ids[1:]`` in float32.

    Args:
        mask: (len(ids), len(ids)) bool, which key (column) a query (row) sees.
        dense_heads: see everything before them, whatever the mask.
    """
    bias, reference = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min), load_reference(model)
    with torch.no_grad(), masks_by_head(reference, mask, dense_heads):
        logits = reference(torch.tensor([ids]), attention_mask=bias[None, None], use_cache=False).logits[0]
    return logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
