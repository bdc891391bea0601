"""What heads that see everything, while the others see star blocks, do not run with."""

from __future__ import annotations

from typing import Any

from starling.features.dense_heads.model_heads import scores_of
from starling.features.report_fields import HEADS, HEADS_ORDER
from starling.features.rule import Rule, reasons, reported
from starling.features.server_options import has_dense_heads, has_documents
from starling.features.star.rules import is_attamba
from starling.vllm_compat.report_to_fronts import engine_reports


def _workers_have_other_scores(config: Any) -> bool:
    """Whether the file of scores has changed between the starts of the workers and of this front."""
    reported = {report.get(HEADS_ORDER) for report in engine_reports(config)} - {None}
    scores = scores_of(config) if reported else None
    return scores is not None and reported != {scores.order_digest}


HEAD_RULES: tuple[Rule, ...] = (
    Rule(lambda c: is_attamba(c), "an Attamba model's layers attend by themselves"),
    Rule(
        lambda c: c.device_config.device_type not in ("cpu", "cuda") and c.device_config.device_type,
        "heads of one layer that see different keys run on CPUs and on CUDA devices",
    ),
    Rule(
        lambda c: c.device_config.device_type != "cpu" and not has_dense_heads(c),
        "on a GPU the server has to be started with --star-heads or --star-dense-heads, since its layers are then made "
        "to attend in several calls",
    ),
    Rule(
        lambda c: c.device_config.device_type != "cpu" and has_documents(c),
        "on a GPU the server is started with --star-segments, and its layers are made for documents",
    ),
    Rule(reported(HEADS), "the engine can't run it, as it found when it started"),
    Rule(
        _workers_have_other_scores,
        "the engine has other scores of the heads than this process, as their file changed between their starts: start "
        "the server anew",
    ),
)


def heads_refusals(vllm_config: Any) -> list[str]:
    """The reasons why some heads can't see everything while the others see star blocks; empty where they can."""
    return list(reasons(HEAD_RULES, vllm_config))
