"""A library of KV pages beyond an engine's own memory: in host memory and on disk, by vLLM's offloading."""
