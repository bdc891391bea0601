"""The options of `starling distil`, and how much memory a training with them takes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from transformers import AutoConfig

from starling.config.adapter import AdapterError, Purpose, read_adapter
from starling.lab.distillation.training_prompts import TRAINED_TASKS
from starling.lab.evaluation.prompt_options import CommandOptions
from starling.lab.evaluation.prompts import read_own_prompts
from starling.lab.evaluation.tasks import choose_tasks

MULTIPLIES_BFLOAT16 = ("amx_bf16", "avx512_bf16")
"""Features of a CPU, by torch's names, with which bfloat16 takes a half of float32's time or less."""

MODULES = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
"""Words of --modules, and the linear layers that they stand for."""
GIB = 2**30
QUESTION_TOKENS = 64
COPIES_OF_LOGITS = 6
"""Copies in float32 that the loss and its gradients have at the same time."""


class DistilOptions(CommandOptions):
    """Options of `starling distil`: what an adapter is trained for, on what, and how."""

    purposes: tuple[Purpose, ...] = Field(
        ("documents",), min_length=1, description="the plans of prompts that it is for: documents, star, or both"
    )
    start: Path | None = Field(
        None, description="an adapter of `starling distil` to go on from, whose rank and layers it has"
    )
    tasks: tuple[str, ...] = Field(TRAINED_TASKS, min_length=1, description="of `starling eval`, beside plain text")
    prompts: Path | None = Field(
        None, description="the user's own prompts, in place of tasks and plain text, or in turns with --tasks if given"
    )
    segments: str | None = Field(
        None, min_length=1, description="the text of the token that starts a document, in your own prompts of text"
    )
    answer_tokens: int = Field(32, ge=1, description="of the answers to your own prompts")
    tokens: int = Field(1024, ge=256, description="the most tokens of a training prompt, without its questions")
    questions: int = Field(8, ge=1, description="about the documents of one prompt")
    steps: int = Field(400, ge=1, description="of training, each with --batch prompts")
    batch: int = Field(1, ge=1, description="prompts of a step")
    learning_rate: float = Field(3e-4, gt=0, lt=1, description="the highest one")
    rank: int = Field(8, ge=1, le=512, description="of the adapter's matrices")
    modules: tuple[str, ...] = Field(
        ("all",), min_length=1, description="the linear layers that it changes: all, attention, or names"
    )
    held_out: int = Field(2, ge=1, description="prompts of each kind that only measure the loss")
    evaluations: int = Field(
        8, ge=1, description="measurements of that loss; training ends early where it falls no more"
    )
    seed: int = Field(0, description="of the prompts and of the adapter's first weights")
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, cuda or cuda:N")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto",
        description="of the model; auto: bfloat16 on GPUs and on CPUs that multiply in it (AMX, AVX512-BF16), "
        "float32 on others",
    )
    recompute: Literal["auto", "on", "off"] = Field(
        "auto",
        description="on: compute each layer again for the gradients, which takes less memory and a third more time; "
        "auto: where the memory would not do otherwise",
    )

    @property
    def chosen_dtype(self) -> str:
        if self.dtype != "auto":
            return self.dtype
        found = torch.cpu.get_capabilities()
        fast = self.device != "cpu" or any(found.get(name) for name in MULTIPLIES_BFLOAT16)
        return "bfloat16" if fast else "float32"

    @property
    def has_tasks(self) -> bool:
        """Return whether it is trained on tasks and plain text."""
        return self.prompts is None or "tasks" in self.model_fields_set

    @property
    def target_modules(self) -> list[str]:
        """Return the names of the linear layers."""
        return sorted({name for word in self.modules for name in MODULES.get(word, (word,))})

    def check(self) -> None:
        """Refuse what can't be used (raises ValueError)."""
        choose_tasks(self.tasks)
        for name in sorted({"rank", "modules"} & self.model_fields_set if self.start is not None else ()):
            raise ValueError(f"{name}={getattr(self, name)!r} is refused: --start has its own. Allowed: one of the two")
        if len(set(self.purposes)) < len(self.purposes):
            raise ValueError(
                f"for={','.join(self.purposes)!r} is refused: a purpose is given twice. Allowed: each once"
            )
        if self.prompts is not None:
            texts = [line for line, own in read_own_prompts(self.prompts) if own.prompt is not None]
            if texts and self.segments is None:
                raise ValueError(
                    f"prompts={str(self.prompts)!r}: line {texts[0]} is a text, which needs --segments TEXT"
                )
        elif self.segments is not None:
            raise ValueError(f"segments={self.segments!r} is refused: it is for your own prompts. Allowed: --prompts")

    def with_start(self, checkpoint: str | None) -> DistilOptions:
        """Return the options with rank and layers of the adapter that training starts from, if there is one.

        Args:
            checkpoint: digest of the model's weights.

        Raises:
            ValueError: the adapter can't be read, or is of another model.
        """
        if self.start is None:
            return self
        try:
            found = read_adapter(str(self.start))
            if found.distilled.checkpoint != checkpoint:
                raise AdapterError(f"it is an adapter of {found.distilled.model}, with other weights")
        except AdapterError as error:
            allowed = "a folder that `starling distil` made of this model"
            raise ValueError(f"start={str(self.start)!r} is refused: {error}. Allowed: {allowed}") from None
        return self.model_copy(update={"rank": found.rank, "modules": found.target_modules})

    def setup(self) -> dict[str, Any]:
        """Return the options that decide the adapter, as JSON."""
        values = self.model_dump(mode="json", exclude={"prompts", "dtype", "recompute", "device", "start"})
        if self.start is not None:
            values["start"] = read_adapter(str(self.start)).digest
        if not self.has_tasks:
            del values["tasks"]
        if self.prompts is not None:
            values["prompts_sha256"] = hashlib.sha256(self.prompts.read_bytes()).hexdigest()
        return values | {"dtype": self.chosen_dtype}


def needed_bytes(folder: Path, options: DistilOptions, *, recompute: bool) -> int:
    """Return about the bytes of weights, of what the gradients need of each layer, and of log-probabilities.

    Args:
        folder: folder of the model.
        recompute: True if layers are computed again, so that one layer's activations are there at a time.
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
