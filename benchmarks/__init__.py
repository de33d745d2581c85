"""Speed and memory of MMAuxQ, measured in a clone of the repository.

Not installed: ``python -m benchmarks --help`` from the root of the clone.
"""
