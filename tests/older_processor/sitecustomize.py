"""Test only: in every process that has this folder on PYTHONPATH, the processor has fewer features than it has.

OLDER_PROCESSOR says which are left: `avx512` without AVX512-BF16 and AMX, or `avx2`. vLLM, torch and Starling ask
torch.cpu for them. The script c++ beside this file compiles for such a processor.
"""

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
from amend_imports import amend

sys.path.pop()

HIDDEN = ["_is_amx_tile_supported", "_is_amx_fp16_supported", "_is_avx512_bf16_supported"]
if os.environ["OLDER_PROCESSOR"] == "avx2":
    HIDDEN += ["_is_avx512_supported", "_is_vnni_supported"]


def _hide(cpu):
    for name in HIDDEN:
        assert hasattr(cpu, name), name
        setattr(cpu, name, lambda: False)


amend("torch.cpu", _hide)
