"""A small network, trained for some steps on the digits."""

import logging

import pytest
import torch

from mmauxq import compat
from tests.conftest import ROOT

CONFIG = str(ROOT / 'configs/aux_r20_w2a2_digits.py')
OPTIONS = ['--cfg-options', 'model.architecture.backbone.depth=8']


@pytest.fixture(scope='session')
def small_config():
    """The digits recipe with 8 layers."""
    compat.enable()
    from mmengine.config import Config

    cfg = Config.fromfile(CONFIG)
    cfg.model.architecture.backbone.depth = 8
    return cfg


@pytest.fixture(scope='session')
def checkpoint(small_config, tmp_path_factory):
    """A training checkpoint with guidance and classes."""
    from mmengine.runner import set_random_seed

    from mmauxq.deploy.network import Network, build

    set_random_seed(0)  # also of the sampler and the crops
    algorithm = build(small_config, small_config.model.guidance)
    algorithm.init_weights()
    optimizer = torch.optim.Adam(algorithm.parameters(), 0.01)
    network = Network(algorithm, small_config, {})
    for inputs, labels in network.batches('train'):
        from mmpretrain.structures import DataSample

        samples = [DataSample().set_gt_label(int(n)) for n in labels]
        algorithm.train()
        losses = algorithm.loss(inputs, samples)
        optimizer.zero_grad()
        sum(v for k, v in losses.items() if 'loss' in k).backward()
        optimizer.step()
    file = tmp_path_factory.mktemp('digits') / 'epoch_1.pth'
    meta = dict(
        epoch=1, iter=19, dataset_meta=dict(classes=list('0123456789'))
    )
    torch.save(dict(meta=meta, state_dict=algorithm.state_dict()), file)
    return file


@pytest.fixture
def network(small_config, checkpoint):
    """That network, ready to export."""
    from mmauxq.deploy.network import load_network

    return load_network(small_config, str(checkpoint))


@pytest.fixture
def fails(capfd, monkeypatch):
    """Runs a command that must fail in one line; returns the line."""
    # MMEngine's logger keeps the output stream of the test before
    monkeypatch.setattr(logging, 'raiseExceptions', False)

    def run(command, *args):
        capfd.readouterr()
        assert command([str(a) for a in args]) == 2
        lines = [
            line
            for line in capfd.readouterr().err.splitlines()
            if ' - mmengine - ' not in line
        ]
        assert len(lines) == 1 and lines[0].startswith('error: '), lines
        return lines[0]

    return run
