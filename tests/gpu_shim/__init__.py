"""vLLM's GPU worker and both model runners, as they are, on a GPU that is not there.

An engine starts as on an H100: vLLM's CUDA platform (tests/gpu_contract/cuda_platform.py), its configuration, its
worker, its CUDA graph manager, FLASH_ATTN with its metadata builders, and Starling's worker and backends around them.
It runs in a process of its own, which ``harness.run_gpu_engine`` starts. The tests compare it with the plain torch
references of tests/parity, and read what its steps ran.

- **Tensors** (device.py). A tensor on "cuda" is a ``GpuTensor``: torch takes it for one of cuda:0, and its numbers lie
  in a CPU tensor. So operands on two devices are an error, and ``device.type`` is "cuda" in all code that asks.
- **Kernels.** Each operation on such tensors is a launch, and is counted. Triton's kernels, vLLM's and Starling's, run
  interpreted. FlashAttention's are emulated and check their contract (tests/gpu_contract/kernels.py). Each is one
  launch.
- **Graphs** (cuda.py). A CUDA graph is the list of the launches of its capture, each with its operands. A replay runs
  them again on the memory that they had, and runs no code of the host. So numbers that the host chose stay as they
  were, and a plan is not asked for. A tensor of before the capture that is gone at the replay is read as NaN: a GPU
  would have given its memory to another.
- **Waits.** What would wait for the GPU in a captured graph is an error, and so it is in ``execute_model`` and
  ``sample_tokens``: vLLM has a check for it (VLLM_GPU_SYNC_CHECK), which needs torch to say what waits. Here device.py
  says it. Only tensors on "cuda" can wait, so what vLLM reads of the host's own tensors is no matter.
- **Copies** from and to pinned memory, for which the host does not wait, may happen at any time until it waits for
  what was launched behind them. Until then, memory that the GPU reads must not change, and what it writes has numbers
  that are in no answer. So a host that prepares the next step too early, or reads a result too early, is an error.
- **Connectors** (connectors_job.py). NIXL and vLLM's copies between host and GPU move the CPU tensors' memory.

What is replaced, and why, is in four places: torch.cuda and torch.accelerator in cuda.py, names of vLLM and Triton in
start.py, the loading of weights in worker.py, and what connectors call in connectors_job.py. checks.py holds the GPU
itself to what a GPU does.

What it leaves out:

- Streams: all are one, and kernels run when they are launched. No race between streams shows.
- What graphs that share a pool of memory do to one another's: a graph's own memory is never given to another tensor.
- Compiled Triton kernels, and vLLM's compiled norms and activations, in whose place layers run torch's functions.
- torch.compile and its piecewise graphs: Dynamo traces no function under a dispatch mode. So ``cudagraph_mode`` is
  FULL_DECODE_ONLY. tests/piecewise.py has piecewise graphs of single layers.
- Sampling other than greedy, which does not run under Triton's interpreter.
- Launches inside an operation of torch: one that a GPU runs as several kernels counts as one.
- Indexing of a GPU's tensor by a list of Python, which is an error here, and a wait on a GPU.
"""
