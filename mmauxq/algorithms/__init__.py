"""The algorithm: one forward pass, one dict of named losses."""

from .joint_qat import JointQAT

__all__ = ['JointQAT']
