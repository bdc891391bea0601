"""How much memory a training takes, known before it starts."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig

from starling.lab.distillation.distil_options import DistilOptions

GIB = 2**30
QUESTION_TOKENS = 64
COPIES_OF_LOGITS = 6
"""Of float32, which the loss and its gradients have at the same time."""


def needed_bytes(folder: Path, options: DistilOptions, *, recompute: bool) -> int:
    """Bytes of weights, of what the gradients need of each layer, and of log-probabilities; about.

    Args:
        folder: of the model.
        recompute: whether layers are computed again, so that one layer's activations are there at a time.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).get_text_config()
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    size = 2 if options.chosen_dtype == "bfloat16" else 4
    tails = options.questions * QUESTION_TOKENS
    rows = options.tokens + tails
    of_layer = rows * (14 * config.hidden_size + 6 * config.intermediate_size) * (size + 2)
    layers = of_layer + rows * config.hidden_size * size * config.num_hidden_layers
    kept = layers if recompute else of_layer * config.num_hidden_layers
    return weights + kept + tails * config.vocab_size * 4 * COPIES_OF_LOGITS
