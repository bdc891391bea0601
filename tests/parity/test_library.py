"""Pages from the library give the results of computing them: behind holes, after a restart, in both model runners."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.random_llama import make_random_llama
from tests.parity.harness import TINY, max_gap, run_engine, v2_env
from tests.parity.test_documents import HEAD, A, B, C, D, E, Prompt, check, tokens_of

pytestmark = pytest.mark.engine

HERE = "tests.parity.test_library"
FORGET, SETTLE = {"scheduler": f"{HERE}:forget"}, {"scheduler": f"{HERE}:settle"}
AFTER = {"ids": tokens_of(5, 40), "max_tokens": 2}  # vLLM begins to store what a step computed in the next step
RUNNERS = {"v1": None, "v2": v2_env()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_llama(tmp_path_factory.mktemp("models") / "tiny", **TINY)


def forget(scheduler: Any) -> None:
    """Empty the engine's own prefix cache."""
    assert scheduler.reset_prefix_cache()


def settle(scheduler: Any) -> None:
    """Return once what has been stored is in files."""
    scheduler.connector.scheduler.manager.secondary_tiers[0].drain_jobs()


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.bin"))


STEPS = [
    ("in another order", [Prompt(HEAD, [D, B, A, C])], [()]),
    ("behind one that is nowhere", [Prompt(HEAD, [E, A, B, C, D])], [(E,)]),
    ("two prompts at once", [Prompt(HEAD, [C, E, A]), Prompt(HEAD, [E, D, C])], [(), ()]),
    ("a second question", [Prompt(HEAD, [D, B], question=tokens_of(98, 17))], [()]),
]


@pytest.mark.parametrize("runner", RUNNERS)
def test_documents_are_found_in_host_memory_and_after_a_restart(model: Path, runner: str, tmp_path: Path) -> None:
    """Nothing is in the engine's own cache, so that what is not computed comes from the library."""
    engine = {"max_num_batched_tokens": 97, "env": RUNNERS[runner], "star": {"star_library": f"{tmp_path}:16MiB"}}
    first = Prompt(HEAD, [A, B, C, D])
    cold = [[prompt.request(cold=True)] for _, prompts, _ in STEPS for prompt in prompts]
    warm: list[Any] = []
    for _, prompts, _ in STEPS:
        warm += [FORGET, [prompt.request() for prompt in prompts], [AFTER]]
    began = run_engine(model, [[first.request()], [AFTER], *warm, SETTLE, *cold], **engine)["batches"]
    again = run_engine(model, warm, **engine)["batches"]
    expected = [output for (output,) in began[-len(cold) :]]
    for results, is_new in ((began[2:], True), (again, False)):
        alone = iter(expected)
        for (description, prompts, missing), outputs in zip(STEPS, results[::2], strict=False):
            for prompt, computed, output in zip(prompts, missing, outputs, strict=True):
                reference = next(alone)
                assert output["cached"] == len(prompt.ids) - prompt.computed(*(computed if is_new else ())), description
                assert output["token_ids"] == reference["token_ids"], description
                assert max_gap(output["logprobs"], torch.tensor(reference["logprobs"])) <= 1e-5, description
                check(model, prompt, output)
    assert len(files(tmp_path)) >= 18  # all of the documents, and the head
    assert {path.stat().st_mode & 0o777 for path in files(tmp_path)} == {0o600}


def test_pages_of_a_lora_adapter_are_those_of_its_files(model: Path, tmp_path: Path) -> None:
    """They are found after a restart, and not where the adapter's files are others, under the same name and path."""
    adapter, files = tmp_path / "adapter", tmp_path / "pages"
    prompt = {"ids": tokens_of(7, 150), "max_tokens": 4, "lora": str(adapter)}
    engine = {"max_num_batched_tokens": 97, "enable_lora": True, "max_lora_rank": 8}
    engine["star"] = {"star_library": f"{files}:16MiB"}
    make_adapter(adapter, seed=1)
    ((cold,), _) = run_engine(model, [[prompt], [AFTER | {"lora": str(adapter)}], SETTLE], **engine)["batches"]
    ((warm,),) = run_engine(model, [[prompt]], **engine)["batches"]
    assert (cold["cached"], warm["cached"]) == (0, 128)
    assert warm["token_ids"] == cold["token_ids"]
    make_adapter(adapter, seed=2)
    ((other,),) = run_engine(model, [[prompt]], **engine)["batches"]
    assert other["cached"] == 0
    assert other["token_ids"] != cold["token_ids"]


def make_adapter(folder: Path, seed: int) -> None:
    """A LoRA adapter of the output projections of attention, with a large effect."""
    folder.mkdir(exist_ok=True)
    random = torch.Generator().manual_seed(seed)
    size = TINY["hidden_size"]
    weights = {
        f"base_model.model.model.layers.{layer}.self_attn.o_proj.lora_{part}.weight": torch.randn(
            *((4, size) if part == "A" else (size, 4)), generator=random
        )
        for layer in range(TINY["num_hidden_layers"])
        for part in "AB"
    }
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["o_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(weights, folder / "adapter_model.safetensors")
