"""All that makes a training step faster or smaller, and nothing else.

Nothing here changes what is computed: without this folder every number is the
same, to the rounding that the docstrings state. Only
:class:`mmauxq.algorithms.JointQAT` uses it, through :func:`accelerate`, and
only where there is a GPU or a speed option was given.

    step.py             the step, in the form that ``model.speed`` asks for
    cuda_graph.py       recorded once as CUDA graphs, then replayed
    grouped_weights.py  all weights quantized in one launch
    fused_norm.py       batch norm, sum, ReLU and quantizer in one pass
    recompute.py        less memory: recomputed in the backward pass
    kernels/            the Triton kernels, and which implementation runs
"""

from mmauxq.quantizers.functional import set_backend

from .kernels.lsq import learned_step_backend
from .recording import release_recordings
from .speed import Speed
from .step import AcceleratedStep, accelerate

set_backend(learned_step_backend)

__all__ = ['AcceleratedStep', 'Speed', 'accelerate', 'release_recordings']
