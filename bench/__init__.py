"""Benchmarks and measured runs; each module is a command, `python -m bench.NAME`."""
