"""`python -m trainer selftest`: whether this package computes on this machine what it should, with figures.

It is the acceptance test for devices that its authors could not run on: every operation against plain formulas in
float64, small models against the same step on the CPU, and with ranks collectives, meshes and latency.
"""
