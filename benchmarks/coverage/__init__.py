"""Which networks of MMPretrain the three lines of config are enough for.

Not installed: ``python -m benchmarks.coverage --help`` from the root of a
clone.
"""
