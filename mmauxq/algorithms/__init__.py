"""The algorithm: one forward pass, one dict of named losses."""

from mmauxq import compat

compat.enable()

from .joint_qat import JointQAT  # noqa: E402

__all__ = ['JointQAT']
