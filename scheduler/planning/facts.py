"""Facts of a prompt and of an engine, from which the prompt's plan is decided; dependence of a model's star blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from starling.config.head_scores import HeadScores
from starling.config.star import StarOptions
from starling.scheduler.planning.plan import StarPlan


@dataclass(frozen=True)
class KnownSegments:
    """Starts of a prompt's documents, as its front knows them; the last one is the question.

    Attributes:
        source: what the documents are: the messages of a chat, or texts that the client has sent.
        starts: token offsets of the prompt, ascending; the head is before the first one.
        refusal: why the starts are not known; None: they are.
    """

    source: Literal["messages", "texts"]
    starts: tuple[int, ...] = ()
    refusal: str | None = None


@dataclass(frozen=True)
class PromptFacts:
    """Facts of a prompt.

    Attributes:
        num_tokens: as the client sent it.
        token_ids: None where it has images or embeddings.
        segments: what its front knows of its documents, or None.
        dense_only: why it can't have a star plan, or None if it can.
        has_lora: whether its request names a LoRA adapter.
    """

    num_tokens: int
    token_ids: list[int] | None = None
    segments: KnownSegments | None = None
    dense_only: str | None = None
    has_lora: bool = False


@dataclass(frozen=True)
class ReplicaSet:
    """The replicas that one prompt may be split over.

    Attributes:
        size: the data-parallel replicas of the server.
        split_refusal: why blocks can't be split over them; None where they can.
        shards_refusal: why the KV of such blocks can't be attended to where it is; None where it can.
    """

    size: int = 1
    split_refusal: str | None = None
    shards_refusal: str | None = None


ONE_REPLICA = ReplicaSet()


@dataclass(frozen=True)
class EngineFacts:
    """Facts of an engine.

    Attributes:
        page_size: tokens of a KV page of the full-attention layers, or None if they have several sizes.
        refusals: why the engine can't run Star Attention; empty if it can.
        find_document_refusals: returns why it can't attend to documents;
            empty if it can. Called where documents are asked for: some of the reasons take a look at the processor.
        find_heads: returns the scores of the model's KV heads, or None if they are not known.
        find_heads_refusals: returns why some heads can't see everything while the others see star blocks; none: they
            can. Called where dense heads are asked for.
        retention_refusals: why no page stays cached for longer than by its last use; none: pages can.
        overlap_refusal: why a block can't see the end of the block before it, or None if it can.
        replicas: over which a prompt may be split.
        max_prompt_tokens: of the engine's prompt, or None if no limit is known.
        num_pages: KV pages of a replica; 0: not known.
        divides_kv: whether prompts may be longer than the memory of one replica.
        token_of: returns the token that a text is, or None if it is not exactly one.
        quality_sizes: word of ``star_quality`` -> the number of star blocks, 1: dense; None: those of the study.
        with_adapter: returns a plan with the server's adapter where it runs with it, or None if there is no adapter.
    """

    page_size: int | None
    refusals: tuple[str, ...] = ()
    find_document_refusals: Callable[[], tuple[str, ...]] = tuple
    find_heads: Callable[[], HeadScores | None] = lambda: None
    find_heads_refusals: Callable[[], tuple[str, ...]] = tuple
    retention_refusals: tuple[str, ...] = ()
    overlap_refusal: str | None = None
    replicas: ReplicaSet = ONE_REPLICA
    max_prompt_tokens: int | None = None
    num_pages: int = 0
    divides_kv: bool = False
    token_of: Callable[[str], int | None] = lambda text: None
    quality_sizes: Mapping[str, int] | None = None
    with_adapter: Callable[[StarPlan, StarOptions, PromptFacts], StarPlan] | None = None

    @property
    def document_refusals(self) -> tuple[str, ...]:
        return self.find_document_refusals()

    @property
    def heads(self) -> HeadScores | None:
        return self.find_heads()

    @property
    def heads_refusals(self) -> tuple[str, ...]:
        return self.find_heads_refusals()


FULL_ATTENTION = ("full_attention", "attention")
HYBRID = "hybrid"  # full attention and layers that carry a state, side by side in one layer (Falcon-H1, Zamba2)


def dependence(model_config: Any) -> str | None:
    """Why a model's star blocks depend on one another, as far as its configuration says; None: they don't.

    Where they depend on one another, the KV of a block can't be computed or reused without the block before it. An
    overlap, which a plan may ask for, is another reason that this function does not look at.

    Args:
        model_config: vLLM's ModelConfig. Starling's own model configurations have the attribute ``star_blocks_depend``.
    """
    text = model_config.hf_text_config
    reason: str | None = getattr(text, "star_blocks_depend", None)
    if reason is not None:
        return reason
    kinds = set(getattr(text, "layer_types", None) or ()) - set(FULL_ATTENTION)
    kinds |= {"sliding window"} if model_config.get_sliding_window() is not None else set()
    kinds |= {HYBRID} if model_config.is_hybrid else set()
    if kinds:
        return f"layers that are not full attention ({', '.join(sorted(kinds))}) carry state across block borders"
    return None
