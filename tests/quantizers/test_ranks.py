import runpy
from pathlib import Path

import torch
from torch.testing import assert_close

SCRIPT = Path(__file__).with_name('two_ranks.py')


def test_ranks_agree_on_the_statistics_of_both(run_python, tmp_path, root):
    """Only rank 1 sees negative values, and much larger ones."""
    x = torch.randn(8, 3, 5, 5)
    x[:4] = x[:4].abs() * 0.1
    torch.save(x, tmp_path / 'x.pt')
    process = run_python(SCRIPT, tmp_path / 'x.pt', tmp_path, cwd=root)
    assert process.returncode == 0, process.stderr
    first, second = (
        torch.load(tmp_path / f'{rank}.pt', weights_only=True)
        for rank in (0, 1)
    )

    script = runpy.run_path(str(SCRIPT))
    model = script['make_quantizers']()
    script['calibrate_all'](model, x)
    assert_close(first, dict(model.state_dict()))
    assert_close(first, second, rtol=0, atol=0)
