"""The two sides of a benchmark, their figures, and the baseline of one device."""
