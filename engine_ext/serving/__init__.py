"""What serves: the `starling` command, the gRPC front beside the OpenAI server, and what both tell clients."""
