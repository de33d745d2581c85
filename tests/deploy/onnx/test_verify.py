"""What an agreement takes for explained, with outputs made for it."""

import pytest
import torch
from torch import nn

from mmauxq.deploy.onnx import verify
from mmauxq.deploy.onnx.graph import Lowered
from mmauxq.quantizers import LSQ

STEP = 0.5
# In steps; the first two values are on rounding ties.
IMAGES = torch.tensor([[[[0.5, 1.5]]], [[[2.0, 1.0]]], [[[1.0, 2.0]]]]) * STEP


class TwoLogits(nn.Module):
    """The two quantized values of an image are its logits, times a slope."""

    def __init__(self, slope=1.0):
        super().__init__()
        self.quantizer = LSQ(2, 'activation')
        self.quantizer.calibrate(IMAGES)
        nn.init.constant_(self.quantizer.step, STEP)
        self.slope = torch.tensor([1.0, slope])

    def forward(self, x, mode='tensor'):
        return self.quantizer(x).flatten(1) * self.slope


def agreement(monkeypatch, codes, logits, slope=1.0):
    """With an artefact that gives these codes and logits."""

    class Session:
        def run(self, names, feed):
            inner = torch.tensor(codes, dtype=torch.uint8).view(3, 1, 1, 2)
            outputs = [torch.tensor(logits).numpy(), inner.numpy()]
            return outputs[: len(names)]

    monkeypatch.setattr(verify, 'with_outputs', lambda model, names: None)
    lowered = Lowered('typed', codes=dict(quantizer=('codes', 0)))
    labels = torch.full((3,), -1)
    return verify.compare(
        TwoLogits(slope).eval(),
        None,
        [(IMAGES, labels)],
        lowered,
        start=lambda model: Session(),
    )


# Half to even: PyTorch rounds the ties to 0 and 2.
CODES = [[0, 2], [2, 1], [1, 2]]
LOGITS = [[0.0, 1.0], [1.0, 0.5], [0.5, 1.0]]


def test_equal_outputs(monkeypatch):
    result = agreement(monkeypatch, CODES, LOGITS)
    assert result.holds and result.same_class == 3 and result.codes == 6
    assert result.ties == result.images_touched == 0


def test_a_tie_explains_another_class_of_its_image(monkeypatch):
    codes = [[1, 1], *CODES[1:]]
    result = agreement(monkeypatch, codes, [[0.5, 0.5], *LOGITS[1:]])
    assert result.holds and result.same_class == 2 and result.ties == 2
    assert result.images_touched == 1 and result.unexplained_classes == 0


@pytest.mark.parametrize('image', [1, 2])
def test_it_explains_none_of_another_image(monkeypatch, image):
    codes = [[1, 1], *CODES[1:]]
    logits = [[0.5, 0.5], *LOGITS[1:]]
    logits[image] = logits[image][::-1]
    result = agreement(monkeypatch, codes, logits)
    assert result.ties == 2 and result.unexplained == 0
    assert result.unexplained_classes == 1 and not result.holds


def test_a_tie_explains_only_what_follows_from_it(monkeypatch):
    """The class of the image with the tie is not that of its codes, though
    its logits are within the rounding of float32 sums."""
    codes = [[1, 2], *CODES[1:]]
    nearly = 0.5 * (1 + 1e-6)  # the larger logit of [1, 2] at this slope
    others = [[1.0, nearly / 2], [0.5, nearly]]
    logits = [[0.5, nearly], *others]
    assert agreement(monkeypatch, codes, logits, nearly).holds
    logits = [[nearly, 0.5], *others]
    result = agreement(monkeypatch, codes, logits, nearly)
    assert result.max_difference < verify.LOGITS * result.largest_logit
    assert result.ties == 1 and result.unexplained == 0
    assert result.unexplained_classes == 1 and not result.holds
