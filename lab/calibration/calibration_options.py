"""The options of `starling calibrate` that decide the scores."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from starling.lab.evaluation.prompt_options import Length, PromptOptions, without_secrets
from starling.lab.evaluation.server_process import option_name

OF_METHOD = {"gradient": ("steps",), "ablation": ("orders", "groups")}
"""The options that decide the scores of one method alone."""

CHOSEN_HERE = ("--additional-config", "--api-key", "--config", "--revision", "--served-model-name", "--tokenizer")
"""Options of a server by which it would have another model or tokenizer, other star options or another key."""


class CalibrationOptions(PromptOptions):
    """Options of `starling calibrate`: what is scored, on which prompts, and how."""

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
        "auto",
        description="of the computation; auto: bfloat16 on GPUs, float32 on CPUs, most of which are slow in it; with "
        "--method ablation the server's own",
    )
    serve_options: tuple[str, ...] = Field((), description="more options of `starling serve`, with --method ablation")

    @property
    def chosen_dtype(self) -> str:
        """Return the dtype; with --method ablation, auto is the server's."""
        auto = "float32" if self.device == "cpu" else "bfloat16"
        return auto if self.dtype == "auto" and self.method == "gradient" else self.dtype

    def setup(self) -> dict[str, Any]:
        """Return the options that decide the scores, as JSON."""
        own = {name: getattr(self, name) for name in ("blocks", "query_tokens", *OF_METHOD[self.method])}
        if self.method == "ablation":
            own |= {"method": self.method, "serve_options": without_secrets(self.serve_options)}
        return self.prompts_setup() | own | {"dtype": self.chosen_dtype}

    def check(self) -> None:
        """Refuse what can't be used (raises ValueError), also options of the other method."""
        super().check()
        if self.method == "gradient" and self.serve_options:
            raise ValueError(f"unknown options: {' '.join(self.serve_options)}. A server's go with --method ablation")
        others = OF_METHOD["ablation"] if self.method == "gradient" else (*OF_METHOD["gradient"], "device")
        for name in others:
            if name in self.model_fields_set:
                given = f"{name}={getattr(self, name)!r}"
                raise ValueError(f"{given} is refused: it does not go with --method {self.method}. Allowed: without it")
        for option in self.serve_options:
            if option_name(option) in CHOSEN_HERE or option.startswith("--star"):
                raise ValueError(f"{option} is refused: it is chosen here. Allowed: other options of `starling serve`")
