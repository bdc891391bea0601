"""The `starling` command, the gRPC front beside the OpenAI server, and the OpenAI server's middleware."""
