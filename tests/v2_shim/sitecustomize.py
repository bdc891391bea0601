"""Test only: lets vLLM's V2 model runner, whose kernels are Triton's, run on a machine without a GPU.

vLLM uses Triton on CPU where triton.backends has an entry `cpu` with an active driver. This puts one there
in every process that has this folder on PYTHONPATH; TRITON_INTERPRET=1 runs the kernels as Python.
"""

import sys
import types
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
from amend_imports import amend

sys.path.pop()


class _ActiveDriver:
    @staticmethod
    def is_active() -> bool:
        return True


def _add_cpu(backends):
    backends.backends["cpu"] = types.SimpleNamespace(driver=_ActiveDriver, compiler=None)


def _mask_logits_by_torch(sampling):
    """vLLM's kernel for top-k and top-p does not run under Triton's interpreter."""
    sampling.apply_top_k_top_p_triton = lambda logits, k, p, **_: sampling.apply_top_k_top_p_pytorch(logits, k, p)


amend("triton.backends", _add_cpu)
amend("vllm.v1.sample.ops.topk_topp_sampler", _mask_logits_by_torch)
