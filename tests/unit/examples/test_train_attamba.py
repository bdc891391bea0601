"""The example that trains Attamba: its vectorised model against a loop over tokens, its training, its exports."""

from __future__ import annotations

import inspect
import json
import math
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.attamba.random_model import make_random_attamba
from benchmarks.random_llama import byte_tokenizer
from examples import attamba_model
from examples.attamba_model import Attamba, AttambaConfig, load_attamba
from examples.stdlib_text import END, Text, byte_ids
from examples.train_attamba import (
    bits_per_byte,
    count_parameters,
    export,
    kv_bytes,
    make_model,
    make_optimiser,
    parse,
    train,
    train_step,
)

SMALL = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "ssm_heads": 2,
    "ssm_state_dim": 5,
    "ssm_inner": 12,
    "conv_size": 4,
}
TINY_RUN = ["--dim", "16", "--heads", "2", "--ffn", "24", "--ssm-inner", "8", "--ssm-state", "4", "--ssm-heads", "2"]
TINY_RUN += ["--batch", "2", "--length", "24", "--warmup", "2", "--windows", "8", "--report-every", "3"]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text() -> Text:
    generator = torch.Generator().manual_seed(0)
    stream = (torch.arange(4000) % 7 * 9 + torch.randint(3, (4000,), generator=generator)).to(torch.int16)
    return Text(stream[:3000], stream[3000:], "made up")


def random_model(chunk_size: int, window: int, folder: Path, **sizes: int) -> Attamba:
    config = SMALL | {"token_chunk": chunk_size, "leading_tokens": window} | sizes
    return load_attamba(make_random_attamba(folder, seed=3, dtype=torch.float64, **config), torch.float64)


# The naive model loops over tokens, layers and heads, with the paper's equations. It shares only the weights with the
# example.


def norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean() + eps) * weight


def silu(x):
    return x / (1 + torch.exp(-x))


def is_boundary(position: int, chunk_size: int, offset: int) -> bool:
    return position == 0 or any(position == k * chunk_size - 1 - offset for k in range(1, position + chunk_size + 2))


def rotated(vector, position, theta):
    """Interleaved RoPE of the vector of one head, as multiplication of complex numbers."""
    pairs = [complex(vector[2 * j], vector[2 * j + 1]) for j in range(len(vector) // 2)]
    angle = [position * theta ** (-2 * j / len(vector)) for j in range(len(pairs))]
    pairs = [p * complex(math.cos(a), math.sin(a)) for p, a in zip(pairs, angle, strict=True)]
    return torch.tensor([part for p in pairs for part in (p.real, p.imag)], dtype=torch.float64)


class NaiveMixer:
    """A Mamba-2 mixer as the recurrence over tokens."""

    def __init__(self, weights, prefix, config):
        self.w = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
        self.config = config
        self.reset()

    def reset(self):
        config = self.config
        size = config.ssm_inner // config.ssm_heads
        self.recent = [torch.zeros(config.ssm_inner + 2 * config.ssm_state_dim, dtype=torch.float64)] * config.conv_size
        self.state = torch.zeros(config.ssm_heads, size, config.ssm_state_dim, dtype=torch.float64)

    def step(self, x):
        config, inner, state = self.config, self.config.ssm_inner, self.config.ssm_state_dim
        row = self.w["in_proj.weight"] @ x
        z, mixed, dt = row[:inner], row[inner : 2 * inner + 2 * state], row[2 * inner + 2 * state :]
        self.recent = [*self.recent[1:], mixed]
        mixed = silu(sum(self.w["conv_weight"][:, i] * past for i, past in enumerate(self.recent)))
        u, b, c = mixed[:inner], mixed[inner : inner + state], mixed[inner + state :]
        dt = torch.log(1 + torch.exp(dt))
        size, out = inner // config.ssm_heads, []
        for head in range(config.ssm_heads):
            part = u[head * size : (head + 1) * size]
            decay = torch.exp(dt[head] * -torch.exp(self.w["A_log"][head]))
            self.state[head] = decay * self.state[head] + dt[head] * torch.outer(part, b)
            out.append(self.state[head] @ c + self.w["D"][head] * part)
        y = norm(torch.cat(out) * silu(z), self.w["ssm_norm.weight"], config.rms_norm_eps)
        return self.w["out_proj.weight"] @ y


def naive_logits(weights: dict, config: AttambaConfig, tokens: list[int]) -> torch.Tensor:
    """(T, vocab_size) of one sequence."""
    eps, size, chunk_size = config.rms_norm_eps, config.head_dim, config.token_chunk
    hidden = [weights["tok_embeddings.weight"][token] for token in tokens]
    for layer in range(config.num_hidden_layers):
        prefix = f"layers.{layer}."
        offset = min(chunk_size - 1, layer * math.floor(chunk_size / config.num_hidden_layers))
        mixers = [NaiveMixer(weights, f"{prefix}{name}.", config) for name in ("k_ssm", "v_ssm")]
        keys, values = [], []
        for t, h in enumerate(hidden):
            if t > 0 and is_boundary(t - 1, chunk_size, offset):
                for mixer in mixers:
                    mixer.reset()
            x = norm(h, weights[prefix + "attention_norm.weight"], eps)
            key, value = (x + mixer.step(x) for mixer in mixers)
            query = weights[prefix + "attentive_ssm.wq.weight"] @ x
            keys.append([rotated(part, t, config.rope_theta) for part in key.split(size)])
            values.append(value.split(size))
            seen = [s for s in range(t) if is_boundary(s, chunk_size, offset) or s >= t - config.leading_tokens] + [t]
            heads = []
            for head, part in enumerate(query.split(size)):
                part = rotated(part, t, config.rope_theta)
                weight = torch.stack([part @ keys[s][head] for s in seen]) / math.sqrt(size)
                weight = torch.exp(weight - weight.max())
                heads.append(sum(w * values[s][head] for w, s in zip(weight / weight.sum(), seen, strict=True)))
            h = h + weights[prefix + "attentive_ssm.wo.weight"] @ torch.cat(heads)
            x = norm(h, weights[prefix + "ffn_norm.weight"], eps)
            gate, up = (weights[f"{prefix}feed_forward.{name}.weight"] @ x for name in ("w1", "w3"))
            hidden[t] = h + weights[prefix + "feed_forward.w2.weight"] @ (silu(gate) * up)
    rows = [weights["output.weight"] @ norm(h, weights["norm.weight"], eps) for h in hidden]
    return torch.stack(rows)


@pytest.mark.parametrize("window", [1, 5, 16])
@pytest.mark.parametrize("chunk_size", [2, 4, 8])
def test_equals_a_loop_over_tokens(chunk_size, window, tmp_path):
    model = random_model(chunk_size, window, tmp_path)
    weights = {name: weight.detach() for name, weight in model.state_dict().items()}
    tokens = torch.randint(61, (2, 29), generator=torch.Generator().manual_seed(chunk_size * window))
    with torch.inference_mode():
        for length in (1, 2, chunk_size, chunk_size + 1, 29):  # ends in token 0, in whole chunks, and inside a chunk
            logits = model(tokens[:, :length])
            expected = torch.stack([naive_logits(weights, model.config, row[:length].tolist()) for row in tokens])
            assert logits.shape == expected.shape
            assert (logits - expected).abs().max() < 1e-10


@pytest.mark.parametrize(("chunk_size", "layers"), [(8, 4), (4, 4), (8, 3), (3, 4), (1, 2)])
def test_boundaries_shift_layer_by_layer(chunk_size, layers, tmp_path):
    """The loop agrees also where P is not a multiple of n, less than n, or 1."""
    model = random_model(chunk_size, 1, tmp_path, num_hidden_layers=layers)
    offsets = [layer.offset for layer in model.layers]
    assert offsets == [min(chunk_size - 1, i * (chunk_size // layers)) for i in range(layers)]
    weights = {name: weight.detach() for name, weight in model.state_dict().items()}
    tokens = torch.randint(61, (1, 2 * chunk_size + 3), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = naive_logits(weights, model.config, tokens[0].tolist())
        assert (model(tokens)[0] - expected).abs().max() < 1e-10


@pytest.mark.parametrize("changed", [0, 1, 9, 20])
def test_is_causal(changed, tmp_path):
    model = random_model(4, 5, tmp_path)
    tokens = torch.randint(60, (1, 27), generator=torch.Generator().manual_seed(1))
    other = tokens.clone()
    other[0, changed] += 1
    with torch.inference_mode():
        difference = (model(tokens) - model(other)).abs().amax(dim=(0, 2))
    assert (difference[:changed] == 0).all()
    assert difference[changed] > 1e-3


def expected_layout(config: AttambaConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of the served checkpoint."""
    dim, ffn, inner, state = config.hidden_size, config.intermediate_size, config.ssm_inner, config.ssm_state_dim
    layout = {
        "tok_embeddings.weight": (config.vocab_size, dim),
        "norm.weight": (dim,),
        "output.weight": (config.vocab_size, dim),
    }
    for i in range(config.num_hidden_layers):
        layer = {
            "attention_norm.weight": (dim,),
            "ffn_norm.weight": (dim,),
            "attentive_ssm.wq.weight": (dim, dim),
            "attentive_ssm.wo.weight": (dim, dim),
            "feed_forward.w1.weight": (ffn, dim),
            "feed_forward.w2.weight": (dim, ffn),
            "feed_forward.w3.weight": (ffn, dim),
        }
        for s in ("k_ssm", "v_ssm"):
            layer |= {
                f"{s}.in_proj.weight": (2 * inner + 2 * state + config.ssm_heads, dim),
                f"{s}.conv_weight": (inner + 2 * state, config.conv_size),
                f"{s}.A_log": (config.ssm_heads,),
                f"{s}.D": (config.ssm_heads,),
                f"{s}.ssm_norm.weight": (inner,),
                f"{s}.out_proj.weight": (dim, inner),
            }
        layout |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return layout


FIELDS = {
    "architectures", "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "intermediate_size", "token_chunk", "leading_tokens", "ssm_heads",
    "ssm_state_dim", "ssm_inner", "conv_size", "rope_theta", "rms_norm_eps", "max_position_embeddings",
    "tie_word_embeddings", "bos_token_id", "eos_token_id", "dtype",
}  # fmt: skip


def test_the_export_has_the_served_layout(tmp_path):
    model = make_model(parse([*TINY_RUN, "--out", str(tmp_path)]))
    export(model, tmp_path, torch.bfloat16, byte_tokenizer())
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected_layout(model.config)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    fields = json.loads((tmp_path / "config.json").read_text())
    assert set(fields) == FIELDS
    assert (fields["architectures"], fields["model_type"]) == (["AttambaForCausalLM"], "attamba")
    assert (fields["num_key_value_heads"], fields["eos_token_id"]) == (fields["num_attention_heads"], END)
    assert (tmp_path / "tokenizer.json").exists()
    tokens = torch.randint(257, (1, 20))
    with torch.inference_mode():
        expected = model.to(torch.bfloat16).float()(tokens)
        assert torch.equal(load_attamba(tmp_path)(tokens), expected)


def test_a_transformer_is_exported_as_a_llama_with_equal_logits(tmp_path):
    from transformers import AutoModelForCausalLM

    model = make_model(parse([*TINY_RUN, "--out", str(tmp_path), "--model", "transformer", "--kv-cut", "4"]))
    export(model, tmp_path, torch.float32, byte_tokenizer())
    llama = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.randint(257, (2, 20))
    with torch.inference_mode():
        assert (llama(tokens).logits - model(tokens)).abs().max() < 1e-4


def test_tokens_are_those_of_the_byte_tokenizer():
    sample = bytes(range(1, 128)).decode() + "é漢👩‍🚀 ÿ"
    ids = byte_ids()[torch.tensor(list(sample.encode()))].tolist()
    assert ids == byte_tokenizer().encode(sample, add_special_tokens=False)
    assert byte_tokenizer().eos_token_id == END
    assert sorted(byte_ids().tolist()) == list(range(256))


@pytest.mark.parametrize("arguments", [[], ["--model", "transformer"]], ids=["attamba", "transformer"])
def test_a_step_decreases_the_loss(arguments, text, tmp_path):
    model = make_model(parse([*TINY_RUN, "--out", str(tmp_path), *arguments]))
    optimiser = make_optimiser(model, 1e-2)
    tokens = text.train[:200].view(4, 50).long()
    before = train_step(model, optimiser, tokens, 1e-2)
    assert train_step(model, optimiser, tokens, 1e-2) < before


def test_a_resumed_run_gives_the_weights_of_an_uninterrupted_one(text, tmp_path):
    whole, cut = (parse([*TINY_RUN, "--steps", "8", "--out", str(tmp_path / name)]) for name in ("whole", "cut"))
    expected = train(whole, text).state_dict()
    train(cut, text, until=5)  # two steps after the last save
    assert not (cut.out / "result.json").exists()
    resumed = train(cut, text).state_dict()
    assert all(torch.equal(resumed[name], weight) for name, weight in expected.items())
    results = [json.loads((run.out / "result.json").read_text()) for run in (whole, cut)]
    assert results[0]["history"] == results[1]["history"]
    assert results[0]["bits_per_byte"] == results[1]["bits_per_byte"]
    assert "resumed at step 3" in (cut.out / "train.log").read_text()
    assert not (cut.out / "saved.pt").exists()
    assert (cut.out / "loss.png").exists()


def test_a_run_with_other_settings_is_not_resumed(text, tmp_path):
    arguments = [*TINY_RUN, "--steps", "8", "--out", str(tmp_path)]
    train(parse(arguments), text, until=3)
    with pytest.raises(SystemExit, match="other settings"):
        train(parse([*arguments, "--lr", "1e-4"]), text)


@pytest.mark.parametrize("size", [1, 3])
def test_bits_per_byte_of_a_uniform_guess(size, text, tmp_path):
    model = make_model(parse([*TINY_RUN, "--out", str(tmp_path)]))
    torch.nn.init.zeros_(model.output.weight)
    token_bytes = torch.full((257,), size)
    bits = bits_per_byte(model, text.validation[:100].view(4, 25).long(), token_bytes)
    assert bits == pytest.approx(math.log2(257) / size)


@pytest.mark.parametrize("window", [1, 5, 40])
@pytest.mark.parametrize("chunk_size", [2, 4, 8])
def test_attention_in_blocks_equals_attention_under_the_whole_mask(chunk_size, window, monkeypatch):
    """Also where the last block is not full."""
    monkeypatch.setattr(attamba_model, "UNCUT", 16)
    monkeypatch.setattr(attamba_model, "BLOCK", 12)
    q, k, v = torch.randn(3, 2, 2, 43, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    blocks = attamba_model.visible_blocks.__wrapped__(43, chunk_size, window, 1)
    mask = attamba_model.visible_mask(43, chunk_size, window, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert len(blocks) == 4
    assert (attamba_model.attend_visible(q, k, v, blocks) - expected).abs().max() < 1e-12
    if window < 12:
        assert all(len(columns) < rows.stop for rows, columns, _ in blocks[1:])  # columns no one sees are left out


@pytest.mark.parametrize("length", [1, 2, 7])
def test_the_gradient_of_the_convolution(length):
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, length, 5), (5, 4))
    )
    assert torch.autograd.gradcheck(attamba_model.CausalConv.apply, (x, weight))


def test_a_step_in_bfloat16_is_near_one_in_float32(text, tmp_path):
    losses, weights = [], []
    for autocast in (False, True):
        model = make_model(parse([*TINY_RUN, "--out", str(tmp_path)]))
        losses.append(
            train_step(model, make_optimiser(model, 1e-2), text.train[:100].view(2, 50).long(), 0.0, autocast)
        )
        weights.append(model.layers[0].k_ssm.conv_weight)
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.02)
    assert weights[0].dtype == weights[1].dtype == torch.float32


@pytest.mark.parametrize(("cut", "chunk_size"), [(1, 1), (4, 4), (8, 8), (2, 2)])
def test_models_compared_have_equal_sizes(cut, chunk_size, tmp_path):
    """Equal numbers of parameters within 1 %, and equal cache bytes per token."""
    attamba = make_model(parse(["--out", str(tmp_path), "--chunk", str(chunk_size)]))
    transformer = make_model(parse(["--out", str(tmp_path), "--model", "transformer", "--kv-cut", str(cut)]))
    assert count_parameters(transformer) == pytest.approx(count_parameters(attamba), rel=0.01)
    assert kv_bytes(transformer)[0] == kv_bytes(attamba)[0] == 2 * 4 * 2 * 128 / cut


CHECKPOINTS = Path(__file__).resolve().parents[3] / "examples" / "checkpoints"


def source_bits(model, source: str) -> float:
    """Mean bits per byte of the model on a source text."""
    tokens = byte_ids()[torch.tensor(list(source.encode()))].long()[None]
    with torch.inference_mode():
        logits = model(tokens[:, :-1])[0]
    return torch.nn.functional.cross_entropy(logits, tokens[0, 1:]).item() / math.log(2)


@pytest.mark.parametrize(
    ("name", "chunk_size", "window"), [("attamba-p4-l32", 4, 32), ("attamba-p8-l16", 8, 16)], ids=["P4", "P8"]
)
def test_committed_checkpoints_are_trained_and_have_the_served_layout(name, chunk_size, window):
    folder = CHECKPOINTS / name
    model = load_attamba(folder)
    assert (model.config.token_chunk, model.config.leading_tokens) == (chunk_size, window)
    tensors = load_file(folder / "model.safetensors")
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == expected_layout(model.config)
    assert (folder / "model.safetensors").stat().st_size < 4_000_000
    assert "bits per byte" in (folder / "train.log").read_text()
    # A uniform guess has 8 bits. The text is part of the training text.
    assert source_bits(model, inspect.getsource(textwrap)[:1000]) < 4


def test_the_committed_transformer_is_trained():
    from transformers import AutoModelForCausalLM

    llama = AutoModelForCausalLM.from_pretrained(CHECKPOINTS / "transformer", dtype=torch.float32).eval()
    assert source_bits(lambda tokens: llama(tokens).logits, inspect.getsource(textwrap)[:1000]) < 4
