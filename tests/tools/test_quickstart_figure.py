import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from tools import quickstart_figure as figures


def test_the_sheet_of_the_quick_start_is_written(tmp_path):
    file = tmp_path / 'sheet.png'
    runs = np.array([[10.0, 20.0], [20.0, 30.0]])
    pair = torch.tensor([0.0, 0.9, 1.2]), torch.tensor([0.0, 1.0, 1.0])
    figures.plot_quickstart(
        file,
        'title',
        {'float': runs, 'plain': runs, 'a with b': runs},
        'layer',
        dict(weight=pair, input=pair),
    )
    assert plt.imread(file).shape[1] > 1000
    assert plt.get_fignums() == []


def test_runs_of_one_seed_are_joined():
    axes = plt.figure().add_subplot()
    figures.plot_seeds(axes, dict(float=[90.0, 92.0], plain=[80.0, 84.0]))
    joined = [list(line.get_ydata()) for line in axes.lines[:2]]
    assert joined == [[90, 80], [92, 84]]
    plt.close()


def test_values_before_and_after_a_quantizer():
    axes = plt.figure().add_subplot()
    figures.plot_rounding(
        axes,
        torch.tensor([0.1, 0.3, 0.4, 0.45]),
        torch.tensor([-0.0, 0.5, 0.5, 0.5]),
    )
    before, after = axes.containers
    assert sum(bar.get_height() for bar in before) == pytest.approx(100)
    assert [bar.get_height() for bar in after] == [25, 75]
    assert [text.get_text() for text in axes.texts] == ['0', '0.5']
    labels = axes.get_legend_handles_labels()[1]
    assert labels == ['before: float', 'after: 2 values']
    plt.close()
