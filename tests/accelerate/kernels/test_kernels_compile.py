"""The kernels compile for a GPU, also on a machine that has none.

The interpreter accepts what the compiler does not, such as a name that
changes its shape in a branch; and the width of an access is visible only here.
"""

import importlib.util
import os
import re

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec('triton') is None, reason='needs Triton'
)

PROGRAM = """
import json, sys
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mmauxq.accelerate.kernels import lsq_triton, max_pool_triton
from mmauxq.accelerate.kernels import norm_triton
from mmauxq.accelerate.kernels import packed_triton, product_norm_triton
from mmauxq.accelerate.kernels import weights_triton

TARGET = GPUTarget('cuda', 90, 32)
TYPES = dict(
    x_ptr='*bf16', y_ptr='*bf16', grad_x_ptr='*bf16', code_ptr='*u8',
    rows='i32', channels='i32', inner='i32', repeats='i32', splits='i32',
    size='i32', scale='fp32', least='fp32', first_ptr='*i64',
    count_ptr='*i64', tensor_ptr='*i64', inside_ptr='*i64', length_ptr='*i64',
    weight_ptr='*i64', out_ptr='*i64',
)


def compiled(kernel, aligned=(), types=None, **constants):
    names = kernel.arg_names
    types = {**TYPES, **(types or {})}
    signature = {
        n: 'constexpr' if n in constants else types.get(n, '*fp32')
        for n in names
    }
    aligned = {*aligned, *(n for n in names if n.endswith('ptr'))}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(n),): v for n, v in constants.items()},
        attrs={
            (names.index(n),): [['tt.divisibility', 16]]
            for n in aligned & set(names) - set(constants)
        },
    )
    options = dict(num_warps=8, enable_fp_fusion=False)
    return triton.compile(source, target=TARGET, options=options).asm['ptx']


codes = dict(QMIN=-8, QMAX=7)
flat = dict(codes, ROWS=4096, OFFSET=True, WIDE=False)
tiles = dict(codes, ROWS=32, CHANNELS=128, OFFSET=True, WIDE=True, inner=1)
grads = dict(grad_ptr='*bf16')
found = {}
k = lsq_triton
found['forward_flat'] = compiled(k.forward_flat, **flat)
found['backward_flat'] = compiled(k.backward_flat, types=grads, **flat)
wide = ['channels']
found['forward_channels'] = compiled(k.forward_channels, wide, **tiles)
found['backward_channels'] = compiled(
    k.backward_channels, wide, grads, **tiles
)
addresses = dict(step_ptr='*i64')
w = weights_triton
found['weights'] = compiled(w.forward_kernel, types=addresses, BLOCK=1024)
found['weights_backward'] = compiled(
    w.backward_kernel, types=dict(addresses, grad_ptr='*i64'), BLOCK=1024,
    TYPE=tl.bfloat16,
)
found['sum'] = compiled(w.sum_kernel, types=dict(out_ptr='*fp32'), BLOCK=1024)
c = packed_triton
packed = dict(OFFSET=True, WIDE=False, EACH=2, BLOCK=2048)
found['pack'] = compiled(c.pack_kernel, **codes, **packed)
found['unpack'] = compiled(c.unpack_kernel, QMIN=-8, **packed)
n = norm_triton
maps = dict(z_ptr='*bf16', identity_ptr='*bf16', out_ptr='*bf16',
            grad_ptr='*bf16', other_ptr='*bf16', more_ptr='*bf16',
            grad_z_ptr='*bf16', grad_identity_ptr='*bf16', x_ptr='*bf16',
            eps='fp32', momentum='fp32')
tile = dict(ROWS=32, CHANNELS=128, WIDE=True)
found['statistics'] = compiled(n.statistics_kernel, wide, maps, **tile)
found['finish'] = compiled(
    n.finish_kernel, types=maps, RUNNING=True, ROWS=512, CHANNELS=4
)
sums = dict(grad_scale='fp32', programs='i32', columns='i32')
found['norm_sum'] = compiled(n.sum_kernel, types=sums, ROWS=512, CHANNELS=4)
for kind in ('quantize', 'add', 'both'):
    flags = dict(tile, QMIN=0, QMAX=15, BOUND=6.0, QUANTIZE=kind != 'add')
    add, both = dict(IDENTITY=kind != 'quantize'), kind == 'both'
    found['norm_' + kind] = compiled(
        n.forward_kernel, wide, maps, BOTH=both, **flags, **add
    )
    flags.update(OTHERS=2 * both, READ=kind != 'quantize', HAS_Z=not both)
    found['norm_reduce_' + kind] = compiled(
        n.reduce_kernel, wide, maps, **flags, **add
    )
    if kind != 'quantize':
        flags.update(BOUND=0.0, QUANTIZE=False, OTHERS=0, READ=False)
    flags.pop('HAS_Z')
    found['norm_backward_' + kind] = compiled(
        n.backward_kernel, wide, maps, **flags
    )
p = product_norm_triton
maps.update(w_ptr='*bf16', g_ptr='*bf16', ahead_ptr='*bf16', rows='i32',
            across_ptr='*bf16', grad_w_ptr='*bf16', y_ptr='*bf16')
several = dict(maps, rows='fp32')
sizes, small = dict(N=512, K=128), dict(CHANNELS=16, BLOCK=64)
deep = dict(DEPTH=64, STAGES=3, WIDE=True)
found['gram'] = compiled(
    p.transposed_product_kernel, A=128, B=128,
    types=dict(maps, a_ptr='*bf16', b_ptr='*bf16'),
    BLOCK_A=128, BLOCK_B=128, SUM=True, ROWS=64, REPEATS=9,
    STAGES=3, WIDE=True,
)
found['product_statistics'] = compiled(
    p.statistics_kernel, types=several, RUNNING=True, **sizes, **small
)
found['product_forward'] = compiled(
    p.forward_kernel, types=maps, QMIN=0, QMAX=15, IDENTITY=True, BOUND=6.0,
    QUANTIZE=True, BOTH=True, KEEP=False, ROWS=64, BLOCK=128, **sizes, **deep,
)
found['product_weight_gradient'] = compiled(
    p.weight_gradient_kernel, types=several, **sizes, **small
)
found['product_across'] = compiled(
    p.across_kernel, types=maps, CHANNELS=64, BLOCK=32, **sizes
)
found['product_input_gradient'] = compiled(
    p.input_gradient_kernel, types=maps, ROWS=128, BLOCK=128, **sizes, **deep
)
m = max_pool_triton
bytes_ = dict(maps, place_ptr='*u8')
window = dict(
    C=64, H=112, W=112, OH=56, OW=56, KH=3, KW=3, SH=2, SW=2, PH=1, PW=1,
    WIDE=True, ROWS=32, CHANNELS=64,
)
found['max_pool'] = compiled(m.forward_kernel, types=bytes_, **window)
found['max_pool_backward'] = compiled(
    m.backward_kernel, types=bytes_, CELLS_H=57, CELLS_W=57, **window
)
json.dump(found, open(sys.argv[1], 'w'))
"""


def test_kernels_compile_for_a_gpu(run_python, tmp_path):
    import json

    (tmp_path / 'program.py').write_text(PROGRAM)
    done = run_python(
        'program.py',
        'ptx.json',
        env=dict(
            os.environ,
            TRITON_INTERPRET='0',
            TRITON_CACHE_DIR=str(tmp_path / 'cache'),
        ),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ptx = json.loads((tmp_path / 'ptx.json').read_text())
    assert len(ptx) == 29
    for name in ('gram', 'product_forward', 'product_input_gradient'):
        assert 'wgmma' in ptx[name], name  # tensor cores
    wide_load = re.compile(r'ld\.global\.v4\.b32')
    wide_store = re.compile(r'st\.global\.v4\.b32')
    # no matter that the size may be odd
    for name in ('forward_flat', 'backward_flat', 'forward_channels',
                 'backward_channels', 'norm_add', 'norm_quantize',
                 'norm_both', 'norm_backward_add', 'norm_backward_quantize',
                 'norm_backward_both', 'max_pool',
                 'max_pool_backward'):  # fmt: skip
        assert wide_load.search(ptx[name]), name
        assert wide_store.search(ptx[name]), name
    for name in ('forward_flat', 'backward_flat'):
        assert 'fma.rn.f32' in ptx[name]  # of the quotient, and no others
