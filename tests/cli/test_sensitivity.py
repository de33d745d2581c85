"""A float ResNet-8 and a quantized one, trained for some steps on digits."""

import json
from functools import partial

import pytest
import torch

from tests.commands import sensitivity_command, train
from tests.conftest import ROOT

CONFIG = str(ROOT / 'configs/qat_r8_w2a2_digits.py')
DOWN = 'backbone.layer2.0.downsample.0'
FILES = ['policy.py', 'sensitivity.json', 'sensitivity.md', 'sensitivity.png']


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
    """'float' and 'quantized' -> file."""
    folder = tmp_path_factory.mktemp('networks')
    short = ['train_cfg.max_epochs=1', 'randomness.seed=0']
    for name, start in (('float', None), ('qat', 'float')):
        more = (
            []
            if start is None
            else [f'model.float_checkpoint={folder / start}/epoch_1.pth']
        )
        config = ROOT / 'configs' / {
            'float': 'float_r8_digits.py', 'qat': 'qat_r8_w2a2_digits.py'
        }[name]  # fmt: skip
        words = [config, '--work-dir', folder / name, '--cfg-options']
        assert train([str(w) for w in (*words, *short, *more)]) == 0
    return dict(
        float=folder / 'float/epoch_1.pth',
        quantized=folder / 'qat/slim.pth',
    )


def measure(checkpoint, out, *options):
    words = [CONFIG, checkpoint, '--out', out, '--images', 200, *options]
    assert sensitivity_command([str(word) for word in words]) == 0
    return json.loads((out / 'sensitivity.json').read_text())


def test_a_float_network(checkpoints, tmp_path, capfd):
    capfd.readouterr()
    out = tmp_path / 'new' / 'out'
    report = measure(
        checkpoints['float'], out, '--bits', 2, 8, 2, '--max-drop', 5
    )
    assert sorted(file.name for file in out.iterdir()) == FILES
    assert report['metric'] == 'accuracy/top1' and report['images'] == 200
    assert report['float_layers'] == {}
    layers = report['layers']
    assert len(layers) == 10
    assert [c['bits']['weight'] for c in layers[DOWN]] == [32, 8, 2]
    assert [c['size'] for c in layers[DOWN]] == [512, 128, 32]
    products = 8 * 16 * 4 * 4
    assert layers[DOWN][1]['bit_operations'] == products * 64
    assert all(
        c[0]['drop'] == c[0]['divergence'] == 0 for c in layers.values()
    )
    first = layers['backbone.conv1']
    assert 0 < first[1]['divergence'] < first[2]['divergence']

    predicted, measured = report['proposals'].values()
    assert predicted['predicted']['drop'] <= 5
    assert measured['measured']['drop'] <= 5
    assert predicted['size'] <= measured['size']
    assert predicted['predicted']['drop'] == pytest.approx(
        sum(
            max(c['drop'], 0)
            for name, choices in layers.items()
            for c in choices
            if c['bits'] == predicted['layers'][name]
        )
    )
    page = (out / 'sensitivity.md').read_text()
    assert capfd.readouterr().out.endswith(f'{page}written: {out}\n')
    size = f'{measured["size"]:,}'
    assert f'| at most 5 points, as measured | {size} |' in page
    assert f'# {size} bytes of weights' in (out / 'policy.py').read_text()


def test_a_policy_is_a_recipe_that_loses_what_was_measured(
    checkpoints, tmp_path
):
    """The network that it builds, calibrated on the same images, has the
    accuracy that was measured."""
    from mmengine.config import Config
    from mmengine.evaluator import Evaluator

    from mmauxq.cli.sensitivity import _calibration_images
    from mmauxq.deploy.network import Network, build, first
    from mmauxq.quantizers import calibrate

    report = measure(
        checkpoints['float'], tmp_path, '--bits', 8, 4, 3, '--size', '9KiB'
    )
    (proposal,) = report['proposals'].values()
    assert proposal['size'] <= 9 * 1024
    cfg = Config.fromfile(tmp_path / 'policy.py')
    assert cfg.train_dataloader and cfg.model.type == 'mmauxq.JointQAT'
    model = build(cfg, None).eval()
    assert {
        name: dict(weight=bits.weight, activation=bits.activation)
        for name, bits in model.bits.items()
    } == proposal['layers']
    state = torch.load(checkpoints['float'], weights_only=False)['state_dict']
    model.load_state_dict(state, strict=False)
    network = Network(model, cfg, {})
    with torch.no_grad():
        images = _calibration_images(network)
        calibrate(model, partial(model, images))
        evaluator = Evaluator(cfg.val_evaluator)
        for images, samples in first(network.samples(), 200):
            evaluator.process(model(images, samples, mode='predict'))
    top1 = evaluator.evaluate(200)['accuracy/top1']
    drop = report['value'] - top1
    assert drop == pytest.approx(proposal['measured']['drop'], abs=1e-4)


def test_layers_of_a_quantized_network_are_as_they_were_trained(
    checkpoints, tmp_path
):
    report = measure(checkpoints['quantized'], tmp_path, '--bits', 4, 2)
    choices = report['layers'][DOWN]
    assert [c['bits']['activation'] for c in choices] == [2, 4, 2]
    assert choices[1]['divergence'] > 0
    assert choices[2]['drop'] == choices[2]['divergence'] == 0
    first = report['layers']['backbone.conv1']
    assert [c['bits']['weight'] for c in first] == [32, 4, 2]
    assert report['proposals'] == {}
    assert 'proposed' not in (tmp_path / 'sensitivity.md').read_text()
    assert sorted(f.name for f in tmp_path.iterdir()) == FILES[1:]


def test_a_policy_of_an_earlier_run_does_not_stay(checkpoints, tmp_path):
    words = ['--bits', '8', '--images', '20']
    measure(checkpoints['float'], tmp_path, *words, '--size', '1MiB')
    assert (tmp_path / 'policy.py').exists()
    measure(checkpoints['float'], tmp_path, *words)
    assert sorted(f.name for f in tmp_path.iterdir()) == FILES[1:]


def test_only_weights_where_inputs_are_float(checkpoints, tmp_path):
    report = measure(
        checkpoints['float'], tmp_path, '--bits', 3, '--size', '9KiB',
        '--cfg-options', 'model.quantizers.activation.bits=32',
    )  # fmt: skip
    expected = dict(weight=3, activation=32)
    assert all(c[1]['bits'] == expected for c in report['layers'].values())
    line = f"('backbone.layer3.0.conv2', {expected}),"
    assert line in (tmp_path / 'policy.py').read_text()


@pytest.fixture
def fails(checkpoints, tmp_path, capfd):
    """Runs the command, which must fail in one line; returns the line. ``out``
    must be as it was."""

    def run(*words, checkpoint=None, config=CONFIG, out=tmp_path / 'out'):
        before = sorted(tmp_path.rglob('*'))
        file = checkpoint or checkpoints['float']
        words = [config, file, '--out', out, *words]
        capfd.readouterr()
        assert sensitivity_command([str(word) for word in words]) == 2
        assert sorted(tmp_path.rglob('*')) == before
        lines = [
            line
            for line in capfd.readouterr().err.splitlines()
            if ' - mmengine - ' not in line
        ]
        assert len(lines) == 1 and lines[0].startswith('error: '), lines
        return lines[0]

    return run


@pytest.mark.parametrize(
    'words, message',
    [
        (['--bits', '1'], "--bits: expected integers from 2 to 8, got '1'"),
        (['--bits', '9'], "--bits: expected integers from 2 to 8, got '9'"),
        (['--bits', '4', 'x'], 'expected integers from 2 to 8'),
        (['--max-drop', '-1'], 'expected a number from 0 to 100'),
        (['--max-drop', 'nan'], 'expected a number from 0 to 100'),
        (['--size', '1GB'], 'expected bytes such as 20000, 64KiB or 1.5MiB'),
        (['--size', '9KiB', '--max-drop', '1'], 'not allowed with'),
        (['--images', '0'], '--images: expected an integer from 1'),
        (
            ['--size', '4KiB'],
            '--size: expected at least the 4,866 bytes that all weights take '
            'at 2 bits, got 4,096',
        ),
        (
            ['--metric', 'accuracy/top9', '--images', '8'],
            '--metric: expected one that the validation gives in percent, '
            "accuracy/top1, got 'accuracy/top9'",
        ),
        (['--cfg-options', 'val_evaluator=None'], 'has no `val_evaluator`'),
        (
            [
                '--cfg-options',
                'model.quantizers.weight.bits=32',
                'model.quantizers.activation.bits=32',
            ],
            'expected bits from 2 to 8 for weights or activations, got 32',
        ),
    ],
)
def test_arguments(fails, words, message):
    assert message in fails(*words)


def test_checkpoints(fails, checkpoints, tmp_path):
    assert 'none.pth does not exist' in fails(checkpoint='none.pth')
    state = torch.load(checkpoints['float'], weights_only=False)['state_dict']
    name = 'backbone.layer3.0.conv1.weight'
    deeper = tmp_path / 'deeper.pth'
    torch.save({**state, name.replace('3.0', '3.1'): state[name]}, deeper)
    line = fails(checkpoint=deeper)
    assert 'got one that also has backbone.layer3.1.conv1.weight' in line
    del state[name]
    torch.save(state, tmp_path / 'other.pth')
    line = fails(checkpoint=tmp_path / 'other.pth')
    assert f'got one of another: {name} is missing' in line
    line = fails(
        '--cfg-options', 'model.quantizers.weight.bits=3',
        checkpoint=checkpoints['quantized'],
    )  # fmt: skip
    assert 'expected 3 bits, as the config says, got 2' in line


def test_a_config_of_a_float_network(fails):
    line = fails(config=ROOT / 'configs/float_r8_digits.py')
    assert "model.type: expected 'mmauxq.JointQAT'" in line


def test_folders(fails, tmp_path):
    (tmp_path / 'file').write_text('mine')
    assert 'expected a folder, got the file' in fails(out=tmp_path / 'file')
    line = fails(out=tmp_path / 'file' / 'out')
    assert 'file/out cannot be written: Not a directory' in line
    (tmp_path / 'policy.py').write_text('mine')
    line = fails(out=tmp_path)
    assert 'which holds policy.py but no sensitivity.json' in line
