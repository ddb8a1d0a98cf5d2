"""Benchmarks: this machine's measured ceilings, every operator beside its rivals, and a report of both."""
