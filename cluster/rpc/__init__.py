"""What both ends of gRPC agree on: methods, documents, streams, status codes and channel options."""
