"""What engines and servers need, imported once for all forks of a process, and what vLLM does once in each process.

On a CPU, vLLM's worker looks through all modules for references to its Triton kernels, for a second; since vLLM 0.34
it does not.
"""

from importlib.util import find_spec

from vllm.platforms import current_platform

import starling.attention_backends.star.backend
import starling.engine_ext.serving.cli.serve
import starling.engine_ext.worker.star_worker
import starling.scheduler.star_scheduler  # noqa: F401

if find_spec("vllm.utils.cpu_triton_utils") is not None:
    pass

current_platform.register_triton_kernel_overrides()
type(current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)
