"""Quantized tensors kept as codes."""

import pytest
import torch

from mmauxq.accelerate.kernels.dispatch import use_form
from mmauxq.accelerate.kernels.packed import PackedTensor
from mmauxq.quantizers.functional import learned_step_quantize

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


@pytest.mark.parametrize(
    'form, dtype',
    [
        ('reference', torch.float32),
        ('reference', torch.bfloat16),
        ('kernel', torch.float32),
        ('kernel', torch.float16),
    ],
)
@pytest.mark.parametrize('with_offset', [False, True])
@pytest.mark.parametrize(
    'qmin, qmax, size',
    [
        (0, 15, 1),
        (-8, 7, 1),
        (0, 255, 2),
        (0, 3, 1),
        (0, 16, 2),
        (-8, 8, 2),
    ],
)
def test_gives_the_tensor_back_to_the_bit(
    qmin, qmax, size, with_offset, form, dtype
):
    """Bytes of the kernel are those of the reference."""
    x = (torch.randn(3, 5, 7, 3) * 2).to(DEVICE, dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    for shape in ((), (1, 5, 1, 1)):
        step = torch.rand(shape).to(DEVICE) + 0.1
        offset = torch.randn(shape).to(DEVICE) if with_offset else None
        with use_form('reference'):
            plain = PackedTensor(x, step, qmin, qmax, offset)
            expected = learned_step_quantize(x, step, qmin, qmax, offset)
        with use_form(form):
            codes = PackedTensor(x, step, qmin, qmax, offset)
            value = codes.value()
        assert torch.equal(codes.data, plain.data)
        assert torch.equal(value, expected)
        assert (value.dtype, value.stride()) == (dtype, x.stride())
        assert codes.data.nbytes == (x.numel() * size + 1) // 2


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match='at most 256 codes'):
        PackedTensor(torch.ones(2), torch.ones(1), -256, 255)
    with pytest.raises(ValueError, match='at most 256 codes'):
        PackedTensor(torch.ones(2), torch.ones(1), 0, 256)
    with pytest.raises(ValueError, match='expected x dense in memory'):
        PackedTensor(torch.ones(4, 4)[:, ::2], torch.ones(1), 0, 15)


def test_when_the_kernel_runs(monkeypatch):
    ran = []

    def run_pack(self, x):
        ran.append(tuple(x.shape))
        return self._pack(x)

    monkeypatch.setattr(PackedTensor, '_run_pack', run_pack)

    def make(shape, step=(1,), dtype=torch.float32):
        x = torch.ones(shape, dtype=dtype, device=DEVICE)
        return PackedTensor(x, torch.ones(step, device=DEVICE), 0, 15)

    with use_form('kernel'):
        make((3,))
        make((1,))
        make((2, 3), dtype=torch.bfloat16)
        make((0,))
        make((3, 2), step=(3, 1))
        make((4,), dtype=torch.float64)
    assert ran == [(3,), (1,), (2, 3)]
    with use_form('reference'):
        make((3,))
    assert len(ran) == 3
    with use_form('auto'):
        make((5,))
    assert ran[3:] == ([(5,)] if DEVICE == 'cuda' else [])
