"""The one place where Starling touches vLLM names that vLLM does not promise to keep. Imports nothing of Starling's.

vLLM promises nothing of a name that starts with an underscore, and little of what lies behind its scheduler's
``kv_cache_manager``. Code outside of this package reads, writes, overrides and wraps no such name. Each function here
says why it is needed, and when it can go. Functions that change vLLM are idempotent, since vLLM may load plugins more
than once in a process.

``.ci/vllm_names`` lists every vLLM name that Starling depends on, and compares the list with a vLLM.
"""
