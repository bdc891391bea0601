"""llama.cpp, vLLM and Starling beside one another on CPU."""
