"""Hooks, constructors, evaluators, loops and tools on a JointQAT.

To all of them it should be the classifier inside. Each part that MMPretrain
and MMEngine register is used by a config of its own, through the commands that
a user types.
"""
