"""What `benchmarks.llama_cpp` runs besides vLLM: the GGUF file in bfloat16, and the process of llama.cpp."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize, quantize

from benchmarks.llama_cpp import __main__ as benchmark
from benchmarks.llama_cpp.gguf_files import to_bf16

JOB = """
import json, sys
job = json.loads(sys.argv[2])
print(json.dumps({"version": "0", "model": job["model"]}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    response = {"first_token_seconds": 0.5, "seconds": 2.5, "token_ids": list(range(request["max_tokens"]))}
    print(json.dumps(response), flush=True)
"""


@pytest.fixture
def quantised(tmp_path):
    """A file with a quantised matrix and a vector, and its values."""
    values = {
        "blk.0.ffn_up.weight": np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32),
        "blk.0.attn_norm.weight": np.random.default_rng(1).normal(size=64).astype(np.float32),
    }
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_rope_freq_base(1e5)
    for name, value in values.items():
        kind = GGMLQuantizationType.Q4_1 if value.ndim > 1 else GGMLQuantizationType.F32
        writer.add_tensor(name, quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_file_in_bfloat16_has_the_weights_and_metadata_of_the_quantised_one(quantised):
    before, after = GGUFReader(quantised), GGUFReader(to_bf16(quantised))
    for name in ("general.architecture", "llama.block_count", "tokenizer.ggml.tokens", "llama.rope.freq_base"):
        assert after.fields[name].contents() == before.fields[name].contents()
        assert after.fields[name].types == before.fields[name].types
    kinds = {"blk.0.ffn_up.weight": GGMLQuantizationType.BF16, "blk.0.attn_norm.weight": GGMLQuantizationType.F32}
    assert {tensor.name: tensor.tensor_type for tensor in after.tensors} == kinds
    for one, other in zip(before.tensors, after.tensors, strict=True):
        values = dequantize(one.data, one.tensor_type)
        found = dequantize(other.data, other.tensor_type)
        assert found.shape == values.shape
        bound = 2**-8 if values.ndim > 1 else 0  # bfloat16 has 8 significant bits
        assert np.all(np.abs(found - values) <= bound * np.abs(values))


def test_a_prompt_in_llama_cpps_process_gives_times_and_tokens(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{JOB}' \"$@\"\n")
    python.chmod(0o755)
    monkeypatch.setattr(benchmark, "PYTHON", python)
    with benchmark.LlamaCpp(tmp_path / "model.gguf", [0]) as model:
        assert model.about["model"].endswith("model.gguf")
        output = model.run([1, 2, 3], 4)
    assert output == {"first_token_seconds": 0.5, "decode_tokens_per_second": 2.0, "token_ids": [0, 1, 2, 3, 4]}
    assert model.child.returncode == 0


def test_a_process_that_ends_is_an_error(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(benchmark, "PYTHON", python)
    with pytest.raises(RuntimeError, match="exit code 3"), benchmark.LlamaCpp(tmp_path / "model.gguf", [0]):
        pass


class Way:
    """Answers with a token of its own."""

    def __init__(self, token: int) -> None:
        self.token, self.lengths = token, []

    def run(self, ids, new):
        self.lengths.append(len(ids))
        return {"first_token_seconds": 1.0, "decode_tokens_per_second": 8.0, "token_ids": [self.token] * (new + 1)}


def test_each_way_runs_each_prompt_in_each_round(monkeypatch):
    monkeypatch.setattr(benchmark, "IDLE_SECONDS", 0)
    by_name = {benchmark.VLLM: Way(1), "same": Way(1), "other": Way(2)}
    rows = benchmark.measure(by_name, [10, 20], new=3, rounds=2)
    assert all(way.lengths == [1024, 10, 10, 20, 20] for way in by_name.values())
    assert [(row["tokens"], row["way"], row["first_token_as_vllm"]) for row in rows[3:]] == [
        (20, benchmark.VLLM, 2),
        (20, "same", 2),
        (20, "other", 0),
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lengths", "9000"], ["--lengths 9000", "8,192", "up to 8127"]),
        (["--lengths", "100"], ["does not exist", "make bench-llama"]),
    ],
)
def test_what_is_refused(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(benchmark, "PYTHON", benchmark.ROOT / "build" / "none" / "python")
    monkeypatch.setattr(sys, "argv", ["llama_cpp", *arguments])
    with pytest.raises(SystemExit):
        benchmark.main()
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
