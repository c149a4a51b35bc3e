"""The life of one request: options, admission, batching, and the answer."""
