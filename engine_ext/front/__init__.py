"""What Starling does in the front's process, for OpenAI and gRPC alike: split prefill, KV reservations, progress."""
