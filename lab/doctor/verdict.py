"""The first lines of `starling doctor`: what its report comes to."""

from __future__ import annotations

from typing import Any

OK, REFUSED = 0, 1


def verdict(report: dict[str, Any]) -> tuple[list[str], int]:
    """(lines, exit code): REFUSED where the server refuses a prompt of the length that was asked about."""
    problem = report["installation"]["problem"]
    if problem is not None:
        return [f"Starling does nothing here: {problem}"], OK
    if "model" not in report:
        vllm = report["installation"]["vllm"]
        return [f"vLLM {vllm} is supported; starling doctor MODEL --prompt-tokens N says what a prompt costs"], OK
    if report["star_refused"]:
        star = f"star: not with this model and these options: {'; '.join(report['star_refused'])}"
    else:
        star = "star: available; --prompt-tokens N says what it saves"
    prompt = report.get("prompt")
    if prompt is None:
        return [star], OK
    tokens = f"{prompt['tokens']:,} tokens"
    if prompt["tokens"] >= prompt["max_model_len"]:
        room = f"the model has {prompt['max_model_len']:,} for prompt and output (max_model_len)"
        return [f"{tokens}: refused, {room}"], REFUSED
    if report["star_refused"]:
        return [star], OK
    ratio = prompt["attention_work_dense_over_star"]
    if prompt["plan_with_star_on"]["attention"] != "star":
        return [f"star: no less attention work at {tokens}: {prompt['plan_with_star_on']['why']}"], OK
    saved = f"star: {ratio:.1f} times less attention work at {tokens}"
    lines = [f"{saved}; loss on your model: not measured, run starling advise"]
    if prompt["by_default"] == "dense":
        lines.append(f"by default such a prompt is dense: {prompt['why']}")
    return lines, OK
