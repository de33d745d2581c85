import pytest
from matplotlib import pyplot as plt

from mmauxq.analysis.allocation import Choice, Loss, Proposal
from mmauxq.analysis.sensitivity import Sensitivity
from mmauxq.compare import sensitivity_figure
from mmauxq.layers import LayerBits


def choice(bits, drop=0.0, divergence=0.0):
    loss = Loss(drop, divergence)
    return Choice(LayerBits(bits, bits, ''), 1024, 10, loss)


FOUND = Sensitivity(
    'accuracy/top1', 90.0, 100,
    {
        'backbone.conv1': [choice(32), choice(8, -0.5, 0.0), choice(2, 70, 3)],
        'head.fc': [choice(32), choice(8, 0.5, 0.1), choice(2, 4, 0.2)],
    },
    {},
)  # fmt: skip
PROPOSAL = Proposal(
    {
        'backbone.conv1': FOUND.layers['backbone.conv1'][0],
        'head.fc': FOUND.layers['head.fc'][2],
    },
    Loss(),
)


@pytest.mark.parametrize('proposal', [None, PROPOSAL])
def test_the_figure(tmp_path, monkeypatch, proposal):
    drawn = []
    save = sensitivity_figure.save_figure

    def keep(figure, path):
        drawn.extend(figure.axes)
        save(figure, path)

    monkeypatch.setattr(sensitivity_figure, 'save_figure', keep)
    file = tmp_path / 'figure.png'
    sensitivity_figure.plot_sensitivity(file, FOUND, proposal)
    assert plt.imread(file).shape[1] > 1000 and plt.get_fignums() == []

    drop, divergence, size = drawn
    names = [label.get_text() for label in drop.get_yticklabels()]
    assert names == ['conv1', 'head.fc']  # as many as rows, the first on top
    assert drop.get_ylim()[0] > drop.get_ylim()[1]

    def dots(axes):
        marked = [line for line in axes.lines if line.get_marker() == 'o']
        return [(*line.get_xdata(), *line.get_ydata()) for line in marked]

    assert dots(drop) == [(-0.5, 0), (70, 0), (0.5, 1), (4, 1)]
    least = sensitivity_figure.LEAST
    assert dots(divergence) == [(least, 0), (3, 0), (0.1, 1), (0.2, 1)]
    low, high = drop.get_xlim()
    assert low < -0.5 and high > 70
    bars = [bar.get_width() for bar in size.patches]
    assert bars == [4, 4] + ([4, 0.25] if proposal else [])
