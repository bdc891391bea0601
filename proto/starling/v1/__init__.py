"""Version 1: messages in inference_pb2, client stub and servicer in inference_pb2_grpc."""
