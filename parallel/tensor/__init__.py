"""Tensor parallelism: which modules are divided, and how; linears, vocabulary and what every rank repeats."""
