"""Rows of numbers and their sinks: metrics.jsonl, the terminal, W&B; throughput, and traces of steps."""
