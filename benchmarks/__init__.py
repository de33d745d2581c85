"""Benchmarks, and the sweep over the configs of MMPretrain."""
