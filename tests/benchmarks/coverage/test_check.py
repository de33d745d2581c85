import pytest

from benchmarks.coverage import check
from benchmarks.coverage.check import count_parameters, try_config
from benchmarks.coverage.configs import NetworkError
from mmauxq.layers import restore

LENET = 'lenet/lenet5_mnist.py'


def test_all_checks_of_a_small_network():
    row = try_config(LENET)
    assert (row.verdict, row.reason) == ('pass', '')
    assert row.backbone == 'LeNet5'
    assert row.quantized == 3 and set(row.kept.values()) == {
        'first layer',
        'classifier',
    }
    assert row.moved == (6, 6)


def test_builds_with_small_images():
    row = try_config('resnet/resnet18_8xb32_in1k.py', build_only=True)
    assert (row.verdict, row.reason) == ('pass', '')
    assert (row.quantized, row.taps) == (19, 9)
    assert row.moved == (0, 0)


def test_what_mmengine_does_not_train_does_not_pass():
    config = 'vision_transformer/vit-base-p16_4xb544-ipu_in1k.py'
    assert count_parameters(config).verdict == 'fail'
    row = try_config(config)
    assert (row.verdict, row.reason) == ('mmpretrain', 'it has no train_cfg')


def test_what_the_command_refuses_fails(tmp_path):
    """Before the first step, or in it."""
    own = tmp_path / 'own.py'
    own.write_text(
        f"_base_ = 'mmpretrain::{LENET}'\ntrain_cfg = dict(val_interval=0)\n"
    )
    row = try_config(str(own), build_only=True)
    assert row.verdict == 'fail' and 'train_cfg.val_interval' in row.reason
    own.write_text(
        f"_base_ = 'mmpretrain::{LENET}'\n"
        'optim_wrapper = dict(clip_grad=dict(no_such=1))\n'
    )
    assert try_config(str(own), build_only=True).verdict == 'pass'
    row = try_config(str(own))
    assert row.verdict == 'fail' and 'no_such' in row.reason


def test_what_mmpretrain_refuses_too(tmp_path):
    own = tmp_path / 'own.py'
    own.write_text(
        f"_base_ = 'mmpretrain::{LENET}'\n"
        "train_cfg = dict(type='EpochBasedTrainLoop')\n"
    )
    row = try_config(str(own), build_only=True)
    assert row.verdict == 'mmpretrain'
    assert 'Only one of `type` or `by_epoch`' in row.reason


def test_the_network_of_mmpretrain_may_be_at_fault(monkeypatch):
    def prepare(row):
        raise NetworkError('no such checkpoint')

    monkeypatch.setattr(check, 'prepare', prepare)
    row = try_config(LENET)
    assert (row.verdict, row.reason) == ('mmpretrain', 'no such checkpoint')


def test_a_network_that_does_not_run_on_its_images():
    """It was trained on another size than its recipe has."""
    row = try_config(
        'tinyvit/tinyvit-21m-distill_8xb256_in1k-384px.py', build_only=True
    )
    assert row.verdict == 'mmpretrain'
    assert row.reason.startswith(
        'architecture: a forward pass on (1, 3, 224, 224) fails'
    )
    assert row.parameters == pytest.approx(21.23, abs=0.01)


def test_scales_that_do_not_move(monkeypatch):
    monkeypatch.setattr(check, 'LEARNING_RATE', 0.0)
    row = try_config(LENET)
    assert (row.verdict, row.moved) == ('fail', (0, 6))
    assert row.reason.startswith('6 of 6 learned scales did not move, such ')


def test_a_conversion_that_changes_the_network(monkeypatch):
    def restored(network):
        restore(network)
        next(network.parameters()).data.add_(1.0)
        return network

    monkeypatch.setattr(check, 'restore', restored)
    row = try_config(LENET)
    assert row.verdict == 'fail'
    assert row.reason == 'the conversion changes what F computes'
