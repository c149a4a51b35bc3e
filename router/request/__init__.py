"""The life of one request: options, admission, gating, and the answer."""
