"""What engines and servers need, imported once for all forks of a process, and what vLLM does once in each process.

On a CPU, vLLM's worker looks through all modules for references to its Triton kernels, for a second.
"""

import vllm.entrypoints.openai.api_server
import vllm.lora.request
import vllm.model_executor.models.llama
import vllm.utils.cpu_triton_utils
import vllm.v1.core.sched.async_scheduler
import vllm.v1.worker.cpu_worker  # noqa: F401
from vllm.platforms import current_platform

import starling.attention_backends.star.backend
import starling.engine_ext.serving.cli.serve
import starling.engine_ext.worker.star_worker
import starling.scheduler.star_scheduler  # noqa: F401

current_platform.register_triton_kernel_overrides()
type(current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)
