"""The machine below: its BLAS, cores, memory limits, and the errors of its devices in words."""
