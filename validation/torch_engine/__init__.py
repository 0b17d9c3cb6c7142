"""A small serving engine in PyTorch, to be read in an hour: continuous batching, chunked prefill, speculation."""
