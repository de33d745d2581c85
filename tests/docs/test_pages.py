"""Every block of the pages for new users, run from the page itself."""

import re
import textwrap

import pytest
import torch
from torch import nn

from tests.conftest import ROOT
from tests.support.pages import blocks, check_shown, run

NOT_RUN = {
    'get_started.md': 2,
    'tutorial.md': 1,
    'how_to/choose_bits.md': 0,
    'how_to/distillation.md': 0,
    'how_to/export_for_a_target.md': 1,
    'how_to/from_python.md': 0,
    'how_to/own_backbone.md': 0,
    'how_to/own_data.md': 2,
    'how_to/resume.md': 0,
    'how_to/several_gpus.md': 1,
    'how_to/write_a_guidance.md': 0,
    'how_to/write_a_quantizer.md': 0,
}
"""Page -> blocks that tests leave out. Each says why, in a comment above."""


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:.*fork:DeprecationWarning')
@pytest.mark.parametrize('name', NOT_RUN)
def test_every_block_runs(name, tmp_path):
    folder = tmp_path / 'project'
    folder.mkdir()
    printed, left_out = None, 0
    for block in blocks((ROOT / 'docs' / name).read_text()):
        assert block.kind in ('bash', 'python', 'text'), block
        if block.reason:
            left_out, printed = left_out + 1, None
        elif block.kind != 'text':
            printed = run(block, folder)
        elif printed is not None:  # else of a block that was left out
            check_shown(block.text, printed)
    assert left_out == NOT_RUN[name]


def test_the_readme_is_one_page():
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 120


def test_the_lines_of_python_of_the_readme(tmp_path, monkeypatch):
    readme = (ROOT / 'README.md').read_text()
    lines = re.search(r'^ {4}import mmauxq\n(?: {4}.*\n)+', readme, re.M)[0]
    assert lines.count('\n') == 10
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, 2), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, 2), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
    )
    loader = [(torch.randn(4, 3, 32, 32), torch.arange(4))] * 2
    names = dict(torch=torch, net=net, loader=loader)
    monkeypatch.chdir(tmp_path)
    exec(textwrap.dedent(lines), names)
    assert names['small'](loader[0][0]).shape == (4, 10)
    assert {file.name for file in tmp_path.iterdir()} == {
        'slim.pth', 'model.onnx'
    }  # fmt: skip


def test_the_versions_are_the_tested_ones():
    rows = re.findall(
        r'^\| ([\w-]+) \| ([\d.]+) \|$',
        (ROOT / 'docs/get_started.md').read_text(),
        flags=re.MULTILINE,
    )
    tested = (ROOT / 'constraints.txt').read_text().splitlines()
    assert len(rows) == 6
    assert {f'{name}=={version}' for name, version in rows} <= set(tested)


def test_the_network_that_is_installed():
    """It has the accuracy that the page shows."""
    from mmengine.config import Config

    from mmauxq.deploy.network import load_network

    name = 'aux_r8_w2a2_digits'
    config = Config.fromfile(ROOT / f'configs/{name}.py')
    checkpoint = ROOT / f'configs/checkpoints/{name}.pth'
    network = load_network(config, str(checkpoint))
    right = [
        network.algorithm(images, mode='tensor').argmax(1) == labels
        for images, labels in network.batches()
    ]
    found = 100 * torch.cat(right).float().mean().item()
    assert found == pytest.approx(93.66, abs=0.01)


def test_every_page_is_tested():
    pages = [ROOT / 'docs/get_started.md', ROOT / 'docs/tutorial.md']
    pages += (ROOT / 'docs/how_to').glob('*.md')
    assert {str(p.relative_to(ROOT / 'docs')) for p in pages} == set(NOT_RUN)


@pytest.mark.parametrize(
    'shown, printed',
    [
        ('top-1 97.33%', 'slim.pth: top-1 1.5%'),
        ('a ... c', 'a b c'),
        ('a\n...\nc', 'a\nb\nc'),
        ('-2 of 1,024 at W4A4', '7 of 3 at W4A4'),
    ],
)
def test_what_a_page_may_leave_out(shown, printed):
    check_shown(shown, printed)


@pytest.mark.parametrize(
    'shown, printed',
    [
        ('at W4A4', 'at W2A2'),
        ('a\nb', 'b\na'),
        ('conv1', 'conv2'),
        ('1 layer', 'many layer'),
    ],
)
def test_what_a_page_may_not_say(shown, printed):
    with pytest.raises(AssertionError, match='not printed'):
        check_shown(shown, printed)
