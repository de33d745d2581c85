import numpy as np
from matplotlib import pyplot as plt

from mmauxq.compare import figures


def test_curves_are_means_over_seeds():
    axes = plt.figure().add_subplot()
    figures.plot_accuracy(
        axes, dict(plain=np.array([[10.0, 20.0], [20.0, 30.0]]))
    )
    assert axes.lines[0].get_ydata().tolist() == [15, 25]
    plt.close()
