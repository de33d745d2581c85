"""Batches of a loader, the next one on its way while the GPU computes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from mmauxq.batch_samples import BatchSamples, stacked

from .running import tensors_in

END = object()


class Batches:
    """The batches of a loader, one after the other, then :data:`END`.

    In every step the host waits for the GPU. What :meth:`fetch` does before
    that, :meth:`take` need not do after it.

    Args:
        batches: From the loader.
        device: Where the images of a batch are moved; ``None`` leaves them.
        preprocessor: Its work on labels is done ahead, see
            :meth:`preprocessing`.
    """

    def __init__(
        self,
        batches: Iterator[Any],
        device: torch.device | None = None,
        preprocessor: nn.Module | None = None,
    ) -> None:
        self.batches, self.device = batches, device
        self.preprocessor = preprocessor
        # the forward that preprocessing() replaces
        self._preprocess: Any = getattr(preprocessor, 'forward', None)
        self._ready: tuple[Any, Any] = (None, None)
        self._next: Any = None
        on_gpu = device is not None and device.type == 'cuda'
        self._stream = torch.cuda.Stream(device) if on_gpu else None

    def fetch(self) -> None:
        """Prepare the next batch, unless it is ready."""
        if self._next is None:
            self._next = self._moved(next(self.batches, END))

    def take(self) -> Any:
        """The next batch, or :data:`END`."""
        self.fetch()
        batch, self._next = self._next, None
        if self._stream is not None and isinstance(batch, dict):
            now = torch.cuda.current_stream(self.device)
            now.wait_stream(self._stream)
            # the labels are views of one tensor, which is recorded once
            memory = {
                tensor.untyped_storage().data_ptr(): tensor
                for tensor in tensors_in(batch)
                if tensor.is_cuda
            }
            for tensor in memory.values():
                tensor.record_stream(now)
        return batch

    @contextmanager
    def preprocessing(self) -> Iterator[None]:
        """Let the preprocessor use the labels that are prepared, and work on
        images of one size together.

        MMPretrain's preprocessor handles them one by one, which takes longer
        than all else that the host does between two steps. The images are
        preprocessed in their step: normalised they would take four times the
        memory, and mixing draws random numbers.
        """
        module, forward = self.preprocessor, self._preprocess
        if module is None:
            yield
            return

        def ahead(data: Any, training: bool = False) -> Any:
            if not isinstance(data, dict) or 'inputs' not in data:
                return forward(data, training)
            images = dict(inputs=stacked(data['inputs']))
            batch, samples = self._ready
            if data is not batch:
                samples = data.get('data_samples')
                if stay_together(module, samples):
                    done = forward(images, training)['inputs']
                    return with_targets(module, done, samples, training)
                batch = data if has_final_labels(module, samples) else None
            if batch is None or module.batch_augments is not None:
                return forward({**data, **images}, training)
            return dict(forward(images, training), data_samples=samples)

        module.forward = ahead  # type: ignore[method-assign]
        try:
            yield
        finally:
            del module.forward  # the forward of its class is back

    def _moved(self, batch: Any) -> Any:
        if self.device is None or not isinstance(batch, dict):
            return batch
        with torch.cuda.stream(self._stream):
            images = self._to_device(batch.get('inputs'))
            samples = batch.get('data_samples')
            batch = dict(batch, inputs=images)
            if isinstance(samples, BatchSamples):
                batch['data_samples'] = samples = samples.to(self.device)
            early = self._preprocess and isinstance(images, Tensor) and samples
            if early and not stay_together(self.preprocessor, samples):
                none = dict(inputs=images[:0], data_samples=samples)
                done = self._preprocess(none, False)  # nothing is mixed
                self._ready = batch, done['data_samples']
        return batch

    def _to_device(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(self.device, non_blocking=True)
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._to_device, value))
        return value


def stay_together(preprocessor: Any, samples: Any) -> bool:
    """Whether :func:`with_targets` can do the work of a preprocessor on
    ``samples``: labels on its device, in one tensor."""
    return (
        isinstance(samples, BatchSamples)
        and samples.labels is not None
        and samples.labels.device == device_to_use(preprocessor)
        and not (preprocessor.to_onehot and preprocessor.num_classes is None)
    )


def with_targets(
    preprocessor: Any, images: Tensor, samples: BatchSamples, training: bool
) -> dict:
    """What MMPretrain's preprocessor gives, whose labels are one by one.

    Args:
        preprocessor: Makes one-hot labels, and mixes them, if it is told to.
        images: (N, C, H, W), normalised.
        samples: Their labels.
        training: Whether images are mixed.
    """
    if preprocessor.to_onehot:
        assert samples.labels is not None
        scores = one_hot(samples.labels, preprocessor.num_classes)
        if training and preprocessor.batch_augments is not None:
            images, scores = preprocessor.batch_augments(images, scores)
        samples = samples.with_scores(scores)
    return dict(inputs=images, data_samples=samples)


def has_final_labels(preprocessor: Any, samples: Any) -> bool:
    """Whether an MMPretrain preprocessor would give each of the ``samples``
    the label that it has."""
    from mmpretrain.structures import DataSample

    if preprocessor.to_onehot or not isinstance(samples, list):
        return False
    if not all(type(sample) is DataSample for sample in samples):
        return False
    labels = [sample.get('gt_label') for sample in samples]
    device = device_to_use(preprocessor)
    return 'gt_score' not in samples[0] and {
        isinstance(label, Tensor) and (label.dtype, label.device)
        for label in labels
    } == {(getattr(labels[0], 'dtype', None), device)}


def device_to_use(preprocessor: Any) -> torch.device:
    """The device of a preprocessor as tensors there give it.

    MMEngine moves a model to ``cuda``, which is the GPU in use, and not equal
    to ``cuda:0``.
    """
    device = preprocessor.device
    if device.type == 'cuda' and device.index is None:
        return torch.device('cuda', torch.cuda.current_device())
    return device


def label_preprocessor(model: nn.Module) -> nn.Module | None:
    """The data preprocessor, unless a subclass may change the labels."""
    from mmpretrain.models import ClsDataPreprocessor

    preprocessor = getattr(model, 'data_preprocessor', None)
    return preprocessor if type(preprocessor) is ClsDataPreprocessor else None


def device_of(model: nn.Module) -> torch.device | None:
    """The GPU of a model; ``None`` if it is on the CPU."""
    return next((p.device for p in model.parameters() if p.is_cuda), None)
