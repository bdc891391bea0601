"""What serves: the `starling` command, the gRPC front beside the OpenAI server, what both tell clients."""
