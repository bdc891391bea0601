"""The measured figures of README.md and docs/benchmarks.md are those of the JSON files in benchmarks/results.

FIGURES has each sentence or row that states figures, with a format field in place of each figure and the values that
the JSON files have for the fields. A page that states another value fails, and the message shows the right text. A
figure that no entry covers fails too, unless UNRECORDED has it.
"""

from __future__ import annotations

import datetime
import json
import re
from statistics import mean, median
from typing import Any

import pytest

from benchmarks.report import RESULTS

ROOT = RESULTS.parents[1]
README, BENCHMARKS, RAG, ADAPTER = "README.md", "docs/benchmarks.md", "docs/recipe-rag.md", "docs/adapter.md"
STORED = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
PATTERN = re.compile(r"\d[\d,.]*(?:x| times| %| s| ms| µs)(?!\w)")
"""A measured figure: a factor, a percentage or a time."""

UNRECORDED = {
    README: {},
    BENCHMARKS: {
        "80 %": "a setting of the soak",
        "95 %": "the probability of all intervals",
    },
}
"""Figures without a JSON file, and where they come from."""


def ttft(result: str, tokens: int, configuration: str) -> dict[str, Any]:
    (rows,) = [measured["rows"] for measured in STORED[result]["results"] if measured["tokens"] == tokens]
    (row,) = [row for row in rows if row["configuration"] == configuration]
    return row


def llama(configuration: str, *kilotokens: int) -> list[float]:
    return [ttft("star_ttft_llama", 1024 * count, configuration)["ttft_speedup"] for count in kilotokens]


def fastest(result: str, tokens: int, *configurations: str) -> list[float]:
    """The least seconds to the first token."""
    return [min(ttft(result, tokens, name)["seconds"]) for name in configurations]


WAYS = ("llama.cpp, bfloat16", "llama.cpp, quantised", "vLLM", "Starling, star n/8")
LLAMA_CPP = {row["way"]: row for row in STORED["llama_cpp"]["rows"] if row["tokens"] == 8064}

BLOCKS = ("n/B = 4", "n/B = 8", "n/B = 16")
FIXED = "B = 2048"
SMOLLM2 = [ttft("star_ttft_smollm2", 8064, name)["ttft_speedup"] for name in BLOCKS]
OF_KEYS = [
    100 * ttft("star_ttft_llama", tokens, name)["attention_over_keys"]
    for tokens in (32768, 65536)
    for name in (*BLOCKS, FIXED)
]
DENSE, STAR, DECODE = (
    "first token, dense, 16,384 tokens",
    "first token, star, 16,384 tokens",
    "a step of decode, 32,768 tokens before it",
)
OP = STORED["cpu_attention"]["vllm_over_starling"]
OP_SECONDS = STORED["cpu_attention"]["seconds"]["bfloat16"][DENSE]
COST = STORED["dense_cost"]
PREFILL_COST, DECODE_COST = (COST["ratio_to_plain"][name] for name in ("prefill 4,096 tokens", "decode 48 tokens"))
INSTALLED, ACTIVATED = "installed, not activated", "activated, dense"
FRONTS, PER_TOKEN = STORED["front_overhead"]["grpc_over_http"], STORED["front_overhead"]["us_per_token"]
CPU_TIME = "CPU time of the server"
OF_HTTP = {kind: sorted(front[kind][0] for front in FRONTS.values()) for kind in ("time", CPU_TIME)}
ATTAMBA, ATTAMBA_SECONDS = STORED["attamba_speed"]["transformer_over_attamba"], STORED["attamba_speed"]["seconds"]
BATCH = ATTAMBA["32 requests at once, 960 tokens and 64 new each"]
CAPACITY = [100 * row["of_allowed"] for row in STORED["attamba_capacity"]["rows"] if row["model"] != "transformer"]
QUALITY = {name: result for name, result in STORED["attamba_quality"].items() if name in ("recall", "text")}
(SOAK,) = STORED["soak"]["runs"]


def attamba(workload: str) -> float:
    return ATTAMBA[workload][0]


def attamba_times(workload: str, scale: float = 1) -> list[float]:
    return [scale * median(ATTAMBA_SECONDS[workload][model]) for model in ("transformer", "attamba")]


def recalled(model: str) -> float:
    """Mean accuracy of benchmarks.attamba.quality at 64 to 256 tokens."""
    accuracy = QUALITY["recall"]["models"][model]["accuracy"]
    return mean(accuracy[distance]["mean"] for distance in ("64", "128", "256"))


def text_bits(pair: str, positions: str = "0 to 1023") -> list[float]:
    """By how many % two models' bits differ on text, between the ends of the interval over seeds."""
    ratio = QUALITY["text"]["bits_ratio"][pair][positions]
    return sorted(abs(100 * value - 100) for value in (ratio["mean"], *ratio["over_seeds"]))


def outcomes(run: dict[str, Any], *kinds: str) -> int:
    """Requests of the soak whose outcome is one of ``kinds``."""
    return sum(counts.get(kind, 0) for counts in run["requests"]["outcomes"].values() for kind in kinds)


OWN = STORED["block_positions"]["seconds"]
OWN_TIMES = {name: [median(runs) for runs in times.values()] for name, times in OWN.items()}
DEFAULT_PLAN = {row["length"]: row for row in STORED["default_plan_qwen2.5-coder-0.5b-instruct"]["rows"]}
EIGHT = DEFAULT_PLAN[8192]["answers"]
DOCUMENTS = STORED["rag_qwen2.5-coder-0.5b-instruct"]
# Right answers behind instructions, and behind two examples too: dense, documents, with an adapter, dense with it.
RETRIEVAL = [row["right"] for row in STORED["rag_adapter-retrieval"]["rows"]]


def seconds_of_default_plan(length: int) -> list[float]:
    """To the first token, with the default plan and dense."""
    return [median(DEFAULT_PLAN[length]["seconds"][way]) for way in ("default", "dense")]


GOODPUT = {(row["rate"], row["mode"]): median(row["request_goodput"]) for row in STORED["goodput"]["rows"]}
FIGURES = [
    (
        BENCHMARKS,
        "of 0.4 requests sent a second, {:.2f} are answered in time with star and {:.2f} dense; of 0.6, {:.2f} and "
        "{:.2f}.",
        [GOODPUT[rate, mode] for rate in (0.4, 0.6) for mode in ("star", "dense")],
    ),
    (
        BENCHMARKS,
        "takes {:.0f} s in llama.cpp with bfloat16, {:.0f} s with its quantised file, {:.0f} s in vLLM, and {:.1f} s "
        "with Starling and star blocks of an eighth. Each later token takes {:.0f} ms, {:.0f} ms, {:.0f} ms and {:.0f} "
        "ms.",
        [
            *(median(LLAMA_CPP[way]["first_token_seconds"]) for way in WAYS),
            *(1000 / median(LLAMA_CPP[way]["decode_tokens_per_second"]) for way in WAYS),
        ],
    ),
    (
        BENCHMARKS,
        "A round of vLLM took {:.0f} s and another {:.0f},",
        [pick(LLAMA_CPP["vLLM"]["first_token_seconds"]) for pick in (min, max)],
    ),
    (
        README,
        "24 documents in a prompt of {:,.0f} tokens: once they are cached, the first token comes after {:.1f} s in any "
        "order, and after {:.1f} s with dense attention",
        [DOCUMENTS["prompt_tokens"], *(DOCUMENTS["seconds"][way] for way in ("documents again", "dense"))],
    ),
    (
        README,
        "Of {} questions about six documents, dense attention answers {} right behind instructions with two examples, "
        "and documents {}; behind instructions alone dense attention {}, and documents {}.",
        [DOCUMENTS["rows"][0]["questions"], *(DOCUMENTS["rows"][row]["right"] for row in (2, 3, 0, 1))],
    ),
    (
        README,
        "[an adapter](docs/adapter.md) for such questions, documents have {} and {}.",
        [RETRIEVAL[6], RETRIEVAL[2]],
    ),
    (
        RAG,
        "with which {2} of 100 questions are right where {1} were, and dense attention has {0};",
        RETRIEVAL[:3],
    ),
    (ADAPTER, "| instructions | {} | {} | {} | {} |", RETRIEVAL[:4]),
    (ADAPTER, "| and two answered questions | {} | {} | {} | {} |", RETRIEVAL[4:]),
    (
        README,
        "the first token takes {:.2f} s. With dense attention, which has to compute the prompt, it takes {:.1f} s.",
        OWN_TIMES["retrieval"],
    ),
    (
        README,
        "At 16,384 tokens on Qwen2.5-Coder-0.5B it comes after {:.1f} s instead of {:.1f} s",
        seconds_of_default_plan(16384),
    ),
    (
        README,
        "at 8,192 tokens {:.0f} % of {} answers are right, and {:.0f} % with dense attention",
        [100 * EIGHT["score"], EIGHT["prompts"], 100 * EIGHT["dense_score"]],
    ),
    (
        RAG,
        "the first token takes {:.2f} s where the documents are cached. Dense attention of the same prompt, of which "
        "vLLM's prefix cache has nothing, takes {:.1f} s",
        OWN_TIMES["retrieval"],
    ),
    (
        README,
        "the first token of a prompt of 64k tokens after {:.0f} s instead of {:.0f} s",
        fastest("star_ttft_llama", 65536, "dense", FIXED)[::-1],
    ),
    (README, "in {} interleaved rounds, no ratio", [len(COST["seconds"]["prefill 4,096 tokens"]["plain vLLM"])]),
    (
        BENCHMARKS,
        "up to {:.1f}x at 64k tokens with blocks of a sixteenth of the prompt, {:.1f}x with blocks of 2,048 tokens",
        llama(BLOCKS[2], 64) + llama(FIXED, 64),
    ),
    (BENCHMARKS, "is {:.0f} to {:.0f} % of the ratio of attended keys", [min(OF_KEYS), max(OF_KEYS)]),
    (BENCHMARKS, "SmolLM2-135M at 8,064 tokens: {:.2f}x, {:.2f}x, {:.2f}x with blocks", SMOLLM2),
    (
        BENCHMARKS,
        "prefill {:.3f} ({:.3f} to {:.3f}) installed, {:.3f} ({:.3f} to {:.3f}) activated; decode {:.3f} ({:.3f} to "
        "{:.3f}) and {:.3f} ({:.3f} to {:.3f}).",
        [value for cost in (PREFILL_COST, DECODE_COST) for name in (INSTALLED, ACTIVATED) for value in cost[name]],
    ),
    (
        BENCHMARKS,
        "In bfloat16: {:.2f}x ({:.1f} s to {:.1f}) for the first token of 16,384 dense tokens, {:.2f}x for the "
        "same under star in blocks of 2,048, and {:.2f}x for a decode step after 32,768 tokens. In float32: {:.2f}x, "
        "{:.2f}x and {:.2f}x,",
        [
            OP["bfloat16"][DENSE][0],
            *(median(OP_SECONDS[name]) for name in ("vllm", "auto")),
            *(OP["bfloat16"][name][0] for name in (STAR, DECODE)),
            *(OP["float32"][name][0] for name in (DENSE, STAR, DECODE)),
        ],
    ),
    (
        BENCHMARKS,
        "gRPC takes {:.2f} to {:.2f} times as long as HTTP, and {:.2f} to {:.2f} times the server's CPU time ({:.0f} "
        "µs against {:.0f} with 16 streams at once; {:.0f} in process)",
        [
            *(OF_HTTP[kind][index] for kind in OF_HTTP for index in (0, -1)),
            *(median(PER_TOKEN["16"][way][CPU_TIME]) for way in ("gRPC", "HTTP", "in process")),
        ],
    ),
    (
        BENCHMARKS,
        "prefill of 32,768 tokens {:.2f}x ({:.1f} s to {:.1f}), of 8,192 {:.2f}x, of 1,024 {:.2f}x. A decode step "
        "after 32,768 tokens {:.2f}x ({:.1f} ms to {:.1f}), after 8,192 {:.2f}x, after 1,024 {:.2f}x.",
        [
            attamba("prefill, 32,768 tokens"),
            *attamba_times("prefill, 32,768 tokens"),
            attamba("prefill, 8,192 tokens"),
            attamba("prefill, 1,024 tokens"),
            attamba("decode, 32,768 tokens"),
            *attamba_times("decode, 32,768 tokens", 1000),
            attamba("decode, 8,192 tokens"),
            attamba("decode, 1,024 tokens"),
        ],
    ),
    (BENCHMARKS, "and all of Attamba's: {:.2f}x ({:.2f} to {:.2f})", BATCH),
    (BENCHMARKS, "{:.0f} to {:.0f} % of what the bytes allow", [min(CAPACITY), max(CAPACITY)]),
    (
        BENCHMARKS,
        "At 64 to 256 tokens, P = 4, L = 32 recalls {:.2f} of the tokens, P = 8, L = 16 recalls {:.2f}, and the "
        "control, which has the mixers of P = 4 and drops nothing, {:.2f}. The transformer recalls {:.2f}, and isoKV4, "
        "whose cache is as small as that of P = 4, {:.2f}.",
        [recalled(name) for name in ("attamba-p4-l32", "attamba-p8-l16", "attamba-p4-l1024", "transformer", "isokv4")],
    ),
    (
        BENCHMARKS,
        "The cache costs {1:.1f} % ({0:.1f} to {2:.1f}) more bits at P = 4, L = 32, against the control, which has the "
        "same mixers and drops nothing, and {4:.1f} % ({3:.1f} to {5:.1f}) in the second half",
        [
            bits
            for span in ("0 to 1023", "512 to 1023")
            for bits in text_bits("attamba-p4-l32 over attamba-p4-l1024", span)
        ],
    ),
    (
        BENCHMARKS,
        "about as many bits as isoKV4, whose cache grows as little ({1:.1f} % ({0:.1f} to {2:.1f}) fewer)",
        text_bits("attamba-p4-l32 over isokv4"),
    ),
    (
        BENCHMARKS,
        "P = 8, L = 16 takes {1:.1f} % ({0:.1f} to {2:.1f}) more bits than the transformer",
        text_bits("attamba-p8-l16 over transformer"),
    ),
    *(
        (
            BENCHMARKS,
            f"| {shown} | {{:,.0f}} | {{:,.0f}} | {{:.0f}} |",
            list(STORED["load_tools_smollm2-135m-instruct"]["medians"][tool].values()),
        )
        for shown, tool in (("`vllm bench serve`", "vllm bench serve"), ("GuideLLM", "GuideLLM"), ("AIPerf", "AIPerf"))
    ),
    (
        BENCHMARKS,
        "| capacity, rate (requests/s) | {:.1f}, {:.1f} |",
        [SOAK[name] for name in ("capacity_requests_per_second", "rate_requests_per_second")],
    ),
    (BENCHMARKS, "| requests sent | {:,} |", [SOAK["requests"]["sent"]]),
    (BENCHMARKS, "| of clients that misbehave | {:,} |", [SOAK["faults"]]),
    (BENCHMARKS, "| arrivals not sent | {:,} |", [SOAK["requests"]["not_sent"]]),
    (BENCHMARKS, "| refused as they must be | {:,} |", [outcomes(SOAK, "refused")]),
    (BENCHMARKS, "vanished or stopped reading | {:,} |", [outcomes(SOAK, "left")]),
    (BENCHMARKS, "| lost | {} |", [SOAK["requests"]["lost"]]),
    (
        BENCHMARKS,
        "| answers compared, different | {:,}, {} |",
        [SOAK["requests"][name] for name in ("answers_checked", "answers_different")],
    ),
    (BENCHMARKS, "in any of them | {}; {:.0f} |", [SOAK["rests"], SOAK["pages_leaked"]]),
    (
        BENCHMARKS,
        "| stalls of event loops, the longest | {:.0f}, {:.1f} ms |",
        [
            sum(loop["stalls"] for loop in SOAK["event_loops"].values()),
            max(loop["longest_ms"] for loop in SOAK["event_loops"].values()),
        ],
    ),
    (
        BENCHMARKS,
        "| series flat, unclear, growing | {}, {}, {} |",
        [
            sum(series["verdict"] == verdict for series in SOAK["series"].values())
            for verdict in ("flat", "unclear", "growing")
        ],
    ),
]


def words_of(page: str) -> str:
    """The text of a page without code blocks, with single spaces."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return " ".join(re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE).split())


@pytest.mark.parametrize(("page", "template", "values"), FIGURES, ids=[template[:40] for _, template, _ in FIGURES])
def test_a_page_states_the_figures_of_the_results(page, template, values):
    assert template.count("{") == len(values)
    text = template.format(*values)
    assert text in words_of(page), f"{page} does not have these figures of benchmarks/results: {text}"


@pytest.mark.parametrize("page", [README, BENCHMARKS])
def test_each_figure_of_a_page_comes_from_a_result(page):
    text = words_of(page)
    for _, template, values in (entry for entry in FIGURES if entry[0] == page):
        text = text.replace(template.format(*values), " ")
    found = set(PATTERN.findall(text))
    assert found == UNRECORDED[page].keys(), "add an entry to FIGURES: CONTRIBUTING.md says how"


def test_no_interval_of_the_cost_without_starling_excludes_one():
    """README.md says that no ratio differs measurably from 1.0."""
    for costs in COST["ratio_to_plain"].values():
        for _, lower, upper in costs.values():
            assert lower <= 1 <= upper


@pytest.mark.parametrize("name", [name for name in STORED if name != "kv_shift_induction"])
def test_a_result_has_machine_versions_and_date(name):
    """Not that of examples/train_kv_shift.py, which has accuracies and runs without vLLM."""
    result = STORED[name]
    assert {"processor", "cores", "python", "vllm", "torch"} <= result["machine"].keys()
    assert datetime.date.fromisoformat(result["date"])
