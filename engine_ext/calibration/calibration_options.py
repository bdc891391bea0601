"""The options of `starling calibrate` that decide the scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from starling.evaluation.prompt_options import Length, PromptOptions

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class CalibrationOptions(PromptOptions):
    """What is scored, on which prompts, and how."""

    lengths: tuple[Length, ...] = Field((1024,), min_length=1, description="tokens of a prompt and its answer")
    prompts_per_cell: int = Field(2, ge=1, description="prompts of each task and length")
    prompt_seed: int = Field(100, description="of the tasks' prompts")
    blocks: int = Field(16, ge=2, description="star blocks that a prompt is cut into")
    query_tokens: int = Field(128, ge=1, description="of the prompt's end, which see the whole prompt")
    method: Literal["gradient", "ablation"] = Field(
        "gradient",
        description="gradient: passes through the model in this process; ablation: answers of `starling serve MODEL`, "
        "which is started for each order, for models that are too large or are quantised",
    )
    steps: int = Field(3, ge=1, description="points between star and dense at which the gradient is taken")
    orders: int = Field(6, ge=1, description="of the heads, with --method ablation")
    groups: int = Field(16, ge=2, description="into which an order is cut, with --method ablation")
    curve_prompts: int = Field(1, ge=0, description="prompts of each task and length for the curve; 0: no curve")
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, cuda or cuda:N")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="of the computation; auto: bfloat16 on GPUs, float32 on CPUs, most of which are slow in it"
    )

    @property
    def chosen_dtype(self) -> str:
        auto = "float32" if self.device == "cpu" else "bfloat16"
        return auto if self.dtype == "auto" else self.dtype

    def setup(self) -> dict[str, Any]:
        """What decides the scores, as JSON."""
        of_method = {"gradient": ("steps",), "ablation": ("method", "orders", "groups")}[self.method]
        own = {name: getattr(self, name) for name in ("blocks", "query_tokens", *of_method)}
        return self.prompts_setup() | own | ({"dtype": self.chosen_dtype} if self.method == "gradient" else {})

    def refuse_others(self, serve_options: Sequence[str]) -> None:
        """Refuse options of the other method (raises ValueError).

        Args:
            serve_options: the arguments that the command does not know.
        """
        if self.method == "gradient" and serve_options:
            raise ValueError(
                f"unknown options: {' '.join(serve_options)}. Options of a server go with --method ablation"
            )
        if self.method == "ablation" and self.device != "cpu":
            raise ValueError(f"device={self.device!r} is refused: --method ablation takes the server's")
