"""Model families that vLLM does not have: registered at plugin load, imported when one of them is served."""
