import numpy as np
import torch
from matplotlib import pyplot as plt

from mmauxq.compare import figures


def test_the_overview_is_written(tmp_path):
    file = tmp_path / 'overview.png'
    figures.plot_overview(
        file,
        'title',
        dict(plain=np.array([[10.0, 20.0], [20.0, 30.0]])),
        dict(joint={'backbone.a': 1.0, 'backbone.b': 0.1}),
        [('a', torch.tensor([0.0, 1.0, 1.0])), ('w', torch.tensor([1.0]))],
    )
    assert plt.imread(file).shape[1] > 1000
    assert plt.get_fignums() == []


def test_curves_are_means_over_seeds():
    axes = plt.figure().add_subplot()
    figures.plot_accuracy(
        axes, dict(plain=np.array([[10.0, 20.0], [20.0, 30.0]]))
    )
    assert axes.lines[0].get_ydata().tolist() == [15, 25]
    plt.close()


def test_shares_of_levels():
    axes = plt.figure().add_subplot()
    figures.plot_levels(axes, torch.tensor([0.0, 0.5, 0.5, 0.5]), 'x', 'k')
    assert [bar.get_height() for bar in axes.patches] == [25, 75]
    assert axes.get_title() == 'x: 2 levels'
    plt.close()
