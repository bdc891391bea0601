"""The options of `starling calibrate` that decide the scores."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from starling.lab.evaluation.prompt_options import Length, PromptOptions


class CalibrationOptions(PromptOptions):
    """Options of `starling calibrate`: what is scored, on which prompts, and how."""

    lengths: tuple[Length, ...] = Field((1024,), min_length=1, description="tokens of a prompt and its answer")
    prompts_per_cell: int = Field(2, ge=1, description="prompts of each task and length")
    prompt_seed: int = Field(100, description="of the tasks' prompts")
    blocks: int = Field(16, ge=2, description="star blocks that a prompt is cut into")
    query_tokens: int = Field(128, ge=1, description="of the prompt's end, which see the whole prompt")
    steps: int = Field(3, ge=1, description="points between star and dense at which the gradient is taken")
    curve_prompts: int = Field(1, ge=0, description="prompts of each task and length for the curve; 0: no curve")
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, cuda or cuda:N")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="of the computation; auto: bfloat16 on GPUs, float32 on CPUs, most of which are slow in it",
    )

    @property
    def chosen_dtype(self) -> str:
        """Return the dtype of the computation."""
        auto = "float32" if self.device == "cpu" else "bfloat16"
        return auto if self.dtype == "auto" else self.dtype

    def setup(self) -> dict[str, Any]:
        """Return the options that decide the scores, as JSON."""
        own = {name: getattr(self, name) for name in ("blocks", "query_tokens", "steps")}
        return self.prompts_setup() | own | {"dtype": self.chosen_dtype}
