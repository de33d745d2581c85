"""The classifier in JointQAT, for those who look for one."""

from contextlib import nullcontext
from typing import Any

from torch import nn

from mmauxq.network.profile import floating
from mmauxq.quantizers import uncalibrated


class ClassifierInside:
    """Hooks, optimizer constructors and tools of MMEngine and MMPretrain find
    in a model with an ``architecture`` what they look for in a classifier."""

    architecture: nn.Module

    @property
    def backbone(self) -> nn.Module:
        """The backbone of the classifier."""
        return self.architecture.backbone

    @property
    def neck(self) -> nn.Module | None:
        """The neck of the classifier."""
        return getattr(self.architecture, 'neck', None)

    @property
    def with_neck(self) -> bool:
        """Whether the classifier has a neck."""
        return self.neck is not None

    @property
    def head(self) -> nn.Module:
        """The head of the classifier."""
        return self.architecture.head

    @property
    def with_head(self) -> bool:
        """True."""
        return True

    def extract_feat(self, *args: Any, **kwargs: Any) -> Any:
        """That of the classifier, with the same arguments; in floating point
        as long as the scales are not set, as a tool that counts
        multiply-adds asks for it."""
        network = self.architecture
        waiting = bool(uncalibrated(network))
        with floating(network) if waiting else nullcontext():
            return network.extract_feat(*args, **kwargs)

    def get_layer_depth(self, param_name: str) -> tuple[int, int]:
        """(depth, number of depths) of a parameter, for learning rates that
        decay with depth; those of guidance are as deep as the head."""
        name = param_name.removeprefix('architecture.')
        return self.architecture.get_layer_depth(name)
