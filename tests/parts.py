"""Which tests `make test` runs, and which `make test-all` runs besides.

`make test` runs all tests without an engine but those of `.ci/`, those of the kernels, and for each capability that the
README names its parity with a plain reference and a real server. `pytest --part first` selects them, and `--part rest`
all others.
"""

from __future__ import annotations

from collections.abc import Iterable

FIRST_FOLDERS = ("tests/unit/", "tests/kernels/")
REST = (
    "tests/unit/ci/",
    "tests/kernels/cpu/test_older_processors.py",
    "tests/e2e/test_serving_grpc.py::test_vllms_benchmark_over_grpc",
)
"""What would be in `make test` else: the tests of the repository itself, other processors than this one, and half a
minute of vLLM's benchmark."""
CAPABILITIES = {
    "recipe-rag.md": (
        "tests/parity/test_documents.py::test_logprobs_are_those_of_positions_of_a_blocks_own[v1]",
        "tests/parity/test_documents.py::test_a_document_is_reused_wherever_it_stands[v1]",
        "tests/e2e/test_serving.py",
    ),
    "adapter.md": (
        "tests/parity/test_adapter.py::test_documents_run_with_it_and_others_without[v1]",
        "tests/e2e/test_adapter.py::test_documents_run_with_it_over_both_fronts_and_others_do_not",
    ),
    "recipe-agents.md": (
        "tests/parity/test_block_reuse.py::test_reused_blocks_give_the_results_of_a_cold_run[v1]",
        "tests/e2e/test_serving.py::test_the_agent_example_computes_what_has_changed",
    ),
    "recipe-documents.md": (
        "tests/parity/test_star_tiny.py::test_prompt_logprobs_are_those_of_the_mask[v1]",
        "tests/parity/test_star_tiny.py::test_prompt_logprobs_are_those_of_the_mask[v2]",
        "tests/parity/test_star_tiny.py::test_prompt_logprobs_are_those_of_the_mask[v1-tp2]",
        "tests/parity/test_star_tiny.py::test_preempted_requests_give_the_same",
        "tests/parity/test_star_cache.py::test_hits_are_correct_and_as_many_as_possible[v1]",
        "tests/e2e/test_serving.py::test_http_responses_have_the_plan",
    ),
    "library.md": (
        "tests/parity/test_library.py::test_documents_are_found_in_host_memory_and_after_a_restart[v1]",
        "tests/e2e/test_library.py::test_what_was_warmed_is_found_by_requests_as_users_send_them",
    ),
    "replicas.md": (
        "tests/e2e/test_replicas.py::test_each_replica_computes_its_part_and_the_output_is_that_of_one_replica",
    ),
    "routers.md": (
        "tests/e2e/test_gateways.py::test_completions_and_chats_are_those_of_a_server",
        "tests/e2e/test_endpoint_picker.py::test_prompts_go_where_their_documents_are",
    ),
    "grpc.md": ("tests/e2e/test_serving_grpc.py",),
    "dense-heads.md": (
        "tests/parity/test_dense_heads.py::test_prompt_logprobs_are_those_of_the_masks[v1]",
        "tests/e2e/test_serving_grpc.py::test_dense_heads_over_both_fronts",
    ),
    "eval.md": ("tests/e2e/test_eval.py::test_star_engages_and_its_numbers_are_those_of_the_plans",),
    "kv-shifting.md": (
        "tests/parity/test_kv_shift.py::test_logprobs_are_those_of_the_reference[llama-v1-compiled]",
        "tests/e2e/test_families.py",
    ),
    "attamba.md": ("tests/parity/test_attamba.py::test_prompts_and_hits[4-5]", "tests/e2e/test_families.py"),
}
"""Page of the README's list -> the beginnings of the names of its tests."""

PLAIN_VLLM = ("tests/e2e/test_plain_vllm.py::test_a_response_has_the_plan",)


def is_first(name: str) -> bool:
    """Whether `make test` runs a test, by its name in pytest."""
    chosen = [*PLAIN_VLLM, *(start for starts in CAPABILITIES.values() for start in starts)]
    return name.startswith((*FIRST_FOLDERS, *chosen)) and not name.startswith(REST)


def split(names: Iterable[str], part: str) -> list[str]:
    """The tests of a part: ``first``, ``rest`` or ``all``."""
    return [name for name in names if part == "all" or is_first(name) == (part == "first")]
