"""Documents in a worker: blocks with positions of their own, whose keys queries meet turned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.config import set_current_vllm_config
from vllm.logger import init_logger

from starling.attention_backends.kernels.rotary import Rotation
from starling.attention_backends.star.document_step import DocumentStep
from starling.attention_backends.star.gpu_impl import attends_by_parts
from starling.attention_backends.star.step import set_positions
from starling.config.entry import config_of
from starling.features.documents.rotations import block_positions_problem, make_rotations, turning_layers
from starling.features.documents.rules import is_made_for_documents
from starling.features.report_fields import BLOCK_POSITIONS
from starling.features.worker_part import Layers, WorkerPart
from starling.scheduler.star.plan import StarPlan
from starling.scheduler.star.request_metadata import RequestMetadata
from starling.vllm_compat.rotary_layers import attention_blocks
from starling.vllm_compat.worker import before_forward

logger = init_logger("vllm.starling")


class Documents(WorkerPart):
    """
    Attributes:
        problem: why the layers of the loaded model can't have such blocks; None: they can.
        is_made_for_documents: whether the engine is, so that on a GPU its layers and graphs have Starling's kernels.
        rotations: layer name -> how its queries are turned, which its implementation has too; None: not made yet.
    """

    def __init__(self, on_cpu: bool, is_made_for_documents: bool) -> None:
        self.on_cpu, self.is_made_for_documents = on_cpu, is_made_for_documents
        self.attends_by_parts = is_made_for_documents and not on_cpu
        self.problem: str | None = None
        self.rotations: dict[str, Rotation] | None = None

    @classmethod
    def make(cls, vllm_config: Any) -> Documents:
        return cls(vllm_config.device_config.device_type == "cpu", is_made_for_documents(vllm_config))

    def loaded(self, worker: Any) -> None:
        """Make the tables of angles, which count when the KV cache is sized; on a GPU the layers are looked at here."""
        if worker.star_refusals or not self.is_made_for_documents:
            return
        if not self.on_cpu:
            with set_current_vllm_config(worker.vllm_config):
                self._check(worker, turning_layers(worker.vllm_config))
        if self.is_made_for_documents:
            self.made_rotations(worker)

    def layers_known(self, worker: Any, layers: Layers) -> None:
        if self.on_cpu:
            self._check(worker, layers.full)

    def _check(self, worker: Any, layer_names: list[str]) -> None:
        """Find out whether these layers can attend to blocks with positions of their own.

        Where they can't, the engine is not made for such blocks: graphs are captured with vLLM's kernels alone.

        Raises:
            RuntimeError: they can't, and prompts have such blocks by default.
        """
        of_model, model = worker.vllm_config.model_config, worker.model_runner.get_model()
        device_type = worker.vllm_config.device_config.device_type
        self.problem = block_positions_problem(
            model, layer_names, device_type, of_model.get_hidden_size(), of_model.dtype
        )
        if self.problem is None:
            # In both model runners, the slots of a step's tokens are known before this: they follow from positions.
            before_forward(worker.model_runner, set_positions)
            return
        config = config_of(worker.vllm_config)
        if config is None or not self.is_made_for_documents:
            return
        if config.star.mode != "off":
            refused = f"star_segments={config.star.segments} is refused: {self.problem}"
            raise RuntimeError(f"{refused}. Allowed for this model: off")
        logger.warning("star_segments=%s has no effect here: %s", config.star.segments, self.problem)
        self.is_made_for_documents = False

    def before_warm_up(self, worker: Any) -> None:
        """Compile the kernels of steps over documents, where an engine on a GPU may have such steps."""
        if self.rotations is None or self.on_cpu:
            return
        from starling.attention_backends.star.warm_up import warm_up  # imports Triton, which a CPU does not need

        blocks = attention_blocks(worker.model_runner.get_model())
        layers = (blocks[name].attention for name in self.rotations)
        warm_up([layer for layer in layers if attends_by_parts(layer.impl)])

    def step_part(
        self, worker: Any, plans: Mapping[str, StarPlan], metadata: Mapping[str, RequestMetadata]
    ) -> DocumentStep | None:
        if not any(plan.documents for plan in plans.values()):
            return None
        self.made_rotations(worker)
        return DocumentStep()

    def made_rotations(self, worker: Any) -> dict[str, Rotation]:
        """Layer name -> how its queries are turned; made at the first use, and given to the layers."""
        if self.rotations is None:
            max_model_len, model = worker.vllm_config.model_config.max_model_len, worker.model_runner.get_model()
            self.rotations = make_rotations(model, max_model_len)
            blocks = attention_blocks(model)
            for name, rotation in self.rotations.items():
                blocks[name].attention.impl.rotation = rotation
        return self.rotations

    def report(self) -> dict[str, str | None]:
        return {BLOCK_POSITIONS: self.problem}


PARTS = (Documents.make,)
