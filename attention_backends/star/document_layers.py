"""Documents in the layers of a worker: which layers can have them, and the rotary embeddings of re-rotated queries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from vllm.config import get_layers_from_vllm_config, set_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention

from starling.attention_backends.kernels.contract import Rotation, rotate_back
from starling.attention_backends.star.backend import takes_star
from starling.attention_backends.star.document_step import DocumentStep
from starling.attention_backends.star.gpu_impl import attends_by_parts, warm_up
from starling.attention_backends.star.gpu_impl import unsupported_reason as unsupported_by_triton
from starling.attention_backends.star.head_step import HeadStep, unsupported_reason
from starling.attention_backends.star.model_heads import ranks_of_layers, scores_of
from starling.attention_backends.star.refusals import (
    HEADS,
    HEADS_ORDER,
    has_dense_heads,
    has_documents,
    is_made_for_documents,
)
from starling.attention_backends.star.step import set_positions
from starling.config.entry import STAR_HEADS, config_of
from starling.config.head_scores import HeadScores
from starling.scheduler.planning.plan import StarPlan
from starling.scheduler.planning.rules import HEADS as DENSE_HEADS
from starling.vllm_compat.models import FIXED_FREQUENCIES, AttentionBlock, angle_table, attention_blocks
from starling.vllm_compat.worker import before_forward

logger = init_logger("vllm.starling")


class DocumentLayers:
    """Documents in the layers of a worker's model.

    Attributes:
        problem: reason why the layers of the loaded model can't have documents, or None if they can.
        is_made_for_documents: whether the engine is made for documents, so that on a GPU its layers and graphs have
            Starling's kernels.
        rotations: layer name -> rotary embedding of its queries, as in its implementation, or None if not made yet.
    """

    def __init__(self, on_cpu: bool, is_made_for_documents: bool) -> None:
        self.on_cpu, self.is_made_for_documents = on_cpu, is_made_for_documents
        self.attends_by_parts = is_made_for_documents and not on_cpu
        self.problem: str | None = None
        self.rotations: dict[str, Rotation] | None = None

    @classmethod
    def make(cls, vllm_config: Any) -> DocumentLayers:
        return cls(vllm_config.device_config.device_type == "cpu", is_made_for_documents(vllm_config))

    def loaded(self, worker: Any) -> None:
        """Make the tables of angles, which count when the KV cache is sized; on a GPU the layers are looked at here."""
        if worker.star_refusals or not self.is_made_for_documents:
            return
        if not self.on_cpu:
            with set_current_vllm_config(worker.vllm_config):
                self._check(worker, rerotating_layers(worker.vllm_config))
        if self.is_made_for_documents:
            self.made_rotations(worker)

    def layers_known(self, worker: Any, full: list[str]) -> None:
        """Check the full-attention layers, once the KV cache is there (raises RuntimeError, as ``loaded``)."""
        if self.on_cpu:
            self._check(worker, full)

    def _check(self, worker: Any, layer_names: list[str]) -> None:
        """Find out whether these layers can attend to documents.

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

        blocks = attention_blocks(worker.model_runner.get_model())
        layers = (blocks[name].attention for name in self.rotations)
        warm_up([layer for layer in layers if attends_by_parts(layer.impl)])

    def step(self, worker: Any, plans: Mapping[str, StarPlan]) -> DocumentStep | None:
        """Return the documents of the step of these plans, by request id, or None if it has none."""
        if not any(plan.documents for plan in plans.values()):
            return None
        self.made_rotations(worker)
        return DocumentStep()

    def made_rotations(self, worker: Any) -> dict[str, Rotation]:
        """Layer name -> how its queries are re-rotated; made at the first use, and given to the layers."""
        if self.rotations is None:
            max_model_len, model = worker.vllm_config.model_config.max_model_len, worker.model_runner.get_model()
            self.rotations = make_rotations(model, max_model_len)
            blocks = attention_blocks(model)
            for name, rotation in self.rotations.items():
                blocks[name].attention.impl.rotation = rotation
        return self.rotations


CHECKED_POSITIONS = (1, 5, 63)
TOLERANCES = {torch.float32: 1e-3}
OTHER_TOLERANCE = 2e-2
"""Largest relative change of a query or key that is rotated and rotated back: rounding takes about 2e-6 in float32, and
5e-3 in bfloat16, in which a query is rounded once more than without that."""


def rerotating_layers(vllm_config: Any) -> list[str]:
    """Names of a loaded model's full-attention layers that attend by the parts of a step, on a GPU."""
    layers = get_layers_from_vllm_config(vllm_config, Attention).items()
    able = ((name, layer) for name, layer in layers if attends_by_parts(layer.impl))
    return [name for name, layer in able if takes_star(layer.get_kv_cache_spec(vllm_config))]


def block_positions_problem(
    model: torch.nn.Module, layer_names: Iterable[str], device_type: str, hidden_size: int, dtype: torch.dtype
) -> str | None:
    """Return the reason why a model's layers can't attend to documents, or None if they can.

    Args:
        layer_names: the full-attention layers.
        device_type: device type of the engine.
        hidden_size: hidden size of the inputs of an attention block.
        dtype: dtype of these inputs, the model's.
    """
    if device_type == "cpu":  # imports a backend that GPUs do not need
        from starling.attention_backends.star.cpu_impl import unsupported_reason
    else:
        unsupported_reason = unsupported_by_triton
    blocks = attention_blocks(model)
    rotations = make_rotations(model, max(CHECKED_POSITIONS) + 1)
    for name in layer_names:
        block = blocks.get(name)
        if block is None or block.rotary is None:
            return f"layer {name} has no rotary embedding beside it"
        if type(block.rotary) not in FIXED_FREQUENCIES:
            kind = type(block.rotary).__name__
            return f"layer {name} has a {kind}, whose angles may not be the same at each position"
        reason = unsupported_reason(block.attention.impl) or rotation_problem(
            block, rotations[name], hidden_size, dtype
        )
        if reason is not None:
            return f"layer {name}: {reason}"
    return None


@torch.inference_mode()
def rotation_problem(block: AttentionBlock, rotation: Rotation, hidden_size: int, dtype: torch.dtype) -> str | None:
    """Return the reason why a block's queries and keys can't be re-rotated to another position, or None if they can.

    A model may leave the rotary embedding out of a layer, scale queries by their position, or change them after the
    rotary embedding. So the same inputs go through the block at position 0 and at others, up to its attention. They
    have the model's dtype: the kernels of quantised layers take no other one, and the weights don't tell it.
    """
    device = rotation.cos.device
    positions = torch.tensor(CHECKED_POSITIONS, device=device)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(positions), hidden_size, generator=generator).to(device, dtype)
    try:
        at_zero, at_positions = (block.queries_and_keys(at, hidden) for at in (torch.zeros_like(positions), positions))
    except Exception as error:
        return f"its queries can't be looked at: {error!r}"
    cos, sin = rotation.cos[positions], rotation.sin[positions]
    for what, first, second in zip(("queries", "keys"), at_zero, at_positions, strict=True):
        rerotated = rotate_back(second, cos, sin, rotation.is_neox_style).float()
        change = ((rerotated - first.float()).norm() / first.float().norm()).item()
        if not change <= TOLERANCES.get(first.dtype, OTHER_TOLERANCE):
            return f"its {what} at one position are not those at another one, re-rotated: {change:.1e} of them differs"
    return None


def make_rotations(model: torch.nn.Module, num_positions: int) -> dict[str, Rotation]:
    """Layer name -> how its queries are rerotated. Layers that share a rotary embedding share the table of angles.

    Args:
        num_positions: the table's length, the longest prompt and its output.
    """
    made: dict[int, Rotation] = {}

    def rotation(rotary: Any) -> Rotation:
        if id(rotary) not in made:
            made[id(rotary)] = Rotation(*angle_table(rotary, num_positions), rotary.is_neox_style)
        return made[id(rotary)]

    rotaries = ((name, block.rotary) for name, block in attention_blocks(model).items())
    return {name: rotation(rotary) for name, rotary in rotaries if type(rotary) in FIXED_FREQUENCIES}


class HeadLayers:
    """Dense heads in the layers of a worker's model.

    Attributes:
        problem: reason why the layers of the loaded model can't have dense heads, or None if they can.
        scores: scores of the model's heads, or None if there are none.
        ranks: layer name -> (KV heads,) the places of this rank's heads in the order of the scores.
    """

    def __init__(self, on_cpu: bool, attends_by_parts: bool) -> None:
        self.on_cpu, self.attends_by_parts = on_cpu, attends_by_parts
        self.problem: str | None = None
        self.scores: HeadScores | None = None
        self.ranks: dict[str, np.ndarray] = {}

    @classmethod
    def make(cls, vllm_config: Any) -> HeadLayers:
        on_cpu = vllm_config.device_config.device_type == "cpu"
        return cls(on_cpu, not on_cpu and has_dense_heads(vllm_config) and not has_documents(vllm_config))

    def layers_known(self, worker: Any, full: list[str], others: list[str]) -> None:
        """Find the ranks of the heads of the full-attention layers, once the KV cache is there.

        Raises:
            RuntimeError: the layers can't run what the server's options ask for.
        """
        self.scores = scores_of(worker.vllm_config)
        if self.scores is None:
            return
        model = worker.model_runner.get_model()
        self.ranks, self.problem = ranks_of_layers(self.scores, model, full, others)
        if self.problem is None and (self.on_cpu or self.attends_by_parts):
            blocks = attention_blocks(model)
            reasons = ((name, unsupported_reason(blocks[name].attention)) for name in self.ranks)
            self.problem = next((f"layer {name}: {reason}" for name, reason in reasons if reason), None)
        if self.problem is None:
            return
        config = config_of(worker.vllm_config)
        if config is not None and has_dense_heads(worker.vllm_config) and config.star.mode != "off":
            share = config.star.dense_heads
            asked = f"{STAR_HEADS}={config.star_heads}" if share is None else f"{DENSE_HEADS}={share}"
            raise RuntimeError(f"{asked}: {self.problem}")

    def step(self, plans: Mapping[str, StarPlan]) -> HeadStep | None:
        """Return the dense heads of the step of these plans, by request id, or None if it has none.

        Raises:
            RuntimeError: a plan's dense heads are not those of this worker's scores.
        """
        asked = [plan.dense_heads for plan in plans.values() if plan.dense_heads]
        for heads in asked:
            if self.problem is not None:
                raise RuntimeError(f"a plan has {heads.count} dense heads: {self.problem}")
            if self.scores is None or self.scores.digest(heads.count) != heads.digest:
                raise RuntimeError(f"a plan has {heads.count} dense heads, which are not those of this worker's scores")
        return HeadStep(plans.values(), self.ranks) if asked else None

    def report(self) -> dict[str, str | None]:
        return {HEADS: self.problem, HEADS_ORDER: None if self.scores is None else self.scores.order_digest}
