"""Model families that vLLM does not have: registered when the plugin loads, imported when one of them is served."""
