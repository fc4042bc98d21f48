"""Benchmarks, each against what users would otherwise run; `python -m tools.bench` writes one report of all."""
