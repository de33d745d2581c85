"""Gradients that lie one behind the other."""

import torch

from mmauxq.accelerate.recording import (
    Recording,
    _recordings,
    flattened,
    release_recordings,
)


class Graph:
    """In the place of a CUDA graph."""

    freed = False

    def reset(self):
        self.freed = True


def test_flat_copies():
    """Of several dtypes and layouts, with the strides of the originals."""
    last = torch.channels_last
    tensors = [
        torch.randn(4, 3, 3, 3).to(memory_format=last),
        torch.randn(5),
        torch.randn(2, 3).to(torch.bfloat16),
        torch.randn(6, 1, 3, 3),
        torch.tensor(3.0),
        torch.randn(4, 6)[:, ::2],  # with gaps
        torch.randn(3, 2).to(torch.bfloat16).t(),
    ]
    flats, parts = flattened(tensors)
    assert [(f.dtype, f.numel()) for f in flats] == [
        (torch.float32, 108 + 5 + 54 + 1 + 12),
        (torch.bfloat16, 12),
    ]
    for tensor, part in zip(tensors, parts, strict=True):
        assert torch.equal(part, tensor) and part.dtype == tensor.dtype
        if tensor is not tensors[5]:
            assert part.stride() == tensor.stride()
    flats[0].zero_()
    flats[1].fill_(2.0)
    for part in parts:
        assert (part == (2.0 if part.dtype == torch.bfloat16 else 0.0)).all()


def test_flat_copies_of_nothing():
    assert flattened([]) == ([], [])


def test_recordings_are_released_both_ways():
    recordings = [Recording.__new__(Recording) for _ in range(2)]
    for recording in recordings:
        recording.forward, recording.backward = Graph(), Graph()
        _recordings.add(recording)
    release_recordings()
    for recording in recordings:
        assert recording.forward.freed and recording.backward.freed
