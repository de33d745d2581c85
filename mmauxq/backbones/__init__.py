"""Backbones that mmpretrain does not have."""

from .cifar_resnet import CIFARResNet

__all__ = ['CIFARResNet']
