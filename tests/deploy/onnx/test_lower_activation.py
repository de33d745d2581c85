"""Functions that clip, as limits of codes."""

import numpy as np
import onnx_ir as ir
from hypothesis import given
from hypothesis import strategies as st

from mmauxq.deploy.onnx.lower_activation import _absorb_clips

ENDS = st.one_of(st.none(), st.integers(-20, 20))
CLIPS = st.tuples(ENDS, ENDS).filter(
    lambda ends: None in ends or ends[0] <= ends[1]
)


def nested(functions):
    """The input and the output of a graph, the first function innermost."""
    graph = ir.Graph([], [], nodes=[], opset_imports={'': 21})
    first = value = ir.val('x')
    for i, ends in enumerate(functions):
        if ends == 'relu':
            value = ir.node('Relu', [value]).outputs[0]
            continue
        inputs = [value]
        for name, end in zip(('min', 'max'), ends, strict=True):
            limit = None
            if end is not None:
                tensor = ir.tensor(np.float32(end / 4))
                limit = ir.val(f'{name}{i}', const_value=tensor)
                graph.register_initializer(limit)
            inputs.append(limit)
        value = ir.node('Clip', inputs).outputs[0]
    return first, value


def evaluated(functions, x):
    for ends in functions:
        low, high = (0, None) if ends == 'relu' else ends
        x = np.clip(
            x,
            -np.inf if low is None else low / 4,
            np.inf if high is None else high / 4,
        )
    return x


@given(
    st.lists(st.one_of(st.just('relu'), CLIPS), max_size=5),
    st.sampled_from([(0, 3), (0, 15), (-8, 7), (-2, 1)]),
    st.sampled_from([0.25, 0.3, 1.0]),
)
def test_nested_functions_have_the_limits_of_them_all(functions, ends, scale):
    first, value = nested(functions)
    source, low, high = _absorb_clips(value, np.float32(scale), *ends)
    assert source is first
    x = np.arange(-60, 60, dtype=np.float32) / 8
    codes = np.rint(
        evaluated(functions, x).astype(np.float32) / np.float32(scale)
    )
    expected = np.clip(codes, *ends)
    limited = np.clip(np.rint(x / np.float32(scale)), low, high)
    assert (limited == expected).all()
