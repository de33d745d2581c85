import copy
import hashlib
import json
import resource
import shutil

import numpy as np
import onnx
import pytest
import torch

from mmauxq import files
from mmauxq.analysis import deployed_bytes
from mmauxq.deploy import checkpoints
from mmauxq.deploy.folder import FILES, REPORT
from mmauxq.deploy.onnx import export as export_module
from mmauxq.deploy.onnx import onnx_model, runtime, verify
from mmauxq.deploy.packed import fill_packed
from mmauxq.errors import TrainingError, UsageError
from mmauxq.quantizers import named_quantizers
from tests.commands import evaluate, export_command
from tests.deploy.conftest import CONFIG, OPTIONS
from tests.support.file_operations import snapshots


@pytest.fixture(scope='module')
def exported(checkpoint, tmp_path_factory):
    """The folder that the command writes, and its lines."""
    out = tmp_path_factory.mktemp('export') / 'new' / 'digits'
    args = [CONFIG, checkpoint, '--out', out, '--images', 599, *OPTIONS]
    assert export_command([str(a) for a in args]) == 0
    return out


def report_of(folder):
    return json.loads((folder / 'report.json').read_text())


def test_the_folder_holds_these_files(exported):
    assert {p.name for p in exported.iterdir()} == set(FILES)
    assert [p.name for p in exported.parent.iterdir()] == ['digits']


def test_the_report_tells_the_checksums(exported):
    found = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in exported.iterdir()
        if file.name != 'report.json'
    }
    assert len(found) == 4 and report_of(exported)['sha256'] == found


def test_the_report_names_every_byte(exported, network):
    sizes = report_of(exported)['sizes']
    for name in ('slim.pth', 'packed.safetensors', 'model.onnx'):
        assert sizes[name] == (exported / name).stat().st_size
    assert sizes['sum_of_bits'] == deployed_bytes(network.architecture)
    assert sizes['float'] > 6 * sizes['sum_of_bits']


def test_model_onnx_agrees_on_the_whole_test_set(exported):
    agreement = report_of(exported)['agreement']['model.onnx']
    assert agreement['holds'] and agreement['images'] == 599
    # a tie touches one image, and explains another class of that image alone
    assert agreement['unexplained_classes'] == 0
    touched = agreement['images_touched']
    assert 599 - agreement['same_class'] <= touched <= agreement['ties']
    assert agreement['codes'] == 599 * (4 * 512 + 3 * 256 + 128)
    assert agreement['ties'] <= 20 and agreement['unexplained'] == 0
    difference = agreement['top1'] - agreement['top1_torch']
    assert abs(difference) * 599 <= touched + 1e-6


def test_the_slim_checkpoint_works_with_the_test_command(
    exported, tmp_path, capfd
):
    args = [CONFIG, exported / 'slim.pth', '--work-dir', tmp_path, *OPTIONS]
    assert evaluate([str(a) for a in args]) == 0
    metrics = json.loads(capfd.readouterr().out.splitlines()[-1])
    top1 = report_of(exported)['agreement']['slim.pth']['top1']
    assert metrics['accuracy/top1'] == pytest.approx(100 * top1, abs=1e-3)


def test_accuracies_are_those_of_the_files(exported, network):
    """The report's numbers for slim and packed, from the files alone."""
    agreement = report_of(exported)['agreement']
    batches = network.images(599)
    architecture = network.architecture
    for file in ('slim.pth', 'packed.safetensors'):
        for parameter in architecture.parameters():
            parameter.data.zero_()
        if file == 'slim.pth':
            state = torch.load(exported / file, weights_only=True)
            architecture.load_state_dict(state['state_dict'])
        else:
            fill_packed(exported / file, architecture)
        top1 = verify.top1(verify.all_logits(architecture, batches), batches)
        assert agreement[file] == dict(bit_equal_on=599, top1=top1)
    page = (exported / 'report.md').read_text()
    assert f'| top-1 of `packed.safetensors` | {top1:.2%} |' in page


@pytest.mark.parametrize(
    'writer, file',
    [('slim_checkpoint', 'slim.pth'), ('write_packed', 'packed.safetensors')],
)
def test_a_file_that_holds_another_network_is_found(
    network, checkpoint, tmp_path, monkeypatch, writer, file
):
    write = getattr(checkpoints, writer)

    def write_another(*args):
        args = copy.deepcopy(args)
        for module in args:
            if isinstance(module, torch.nn.Module):
                module.head.fc.bias.data[0] += 0.01
        return write(*args)

    monkeypatch.setattr(checkpoints, writer, write_another)
    with pytest.raises(UsageError, match=f'{file}: the network that was wri'):
        export_module.export(
            network, checkpoint, tmp_path / 'out', images=0, say=lambda _: 0
        )


def test_the_report_tells_the_cost(exported):
    report = report_of(exported)
    first = report['layers'][1]
    assert first['name'] == 'backbone.layer1.0.conv1'
    assert first['multiply_adds'] == 8 * 8 * 9 * 8 * 8
    assert first['bit_operations'] == 4 * first['multiply_adds']
    # how many of the 4 levels are in use depends on the training
    assert 2 <= first['weight_levels'] <= 4
    assert 2 <= first['input_levels'] <= 4
    assert report['layers'][0]['weight_bits'] == 32
    assert report['guidance']['type'] == 'mmauxq.AuxAdaptorAggregator'
    assert report['guidance']['parameters'] > 0
    page = (exported / 'report.md').read_text()
    assert '| backbone.layer1.0.conv1 | 2 | 2 |' in page
    assert 'the files hold nothing of it' in page


def test_the_metadata_say_how_to_use_it(exported):
    model = onnx.load(exported / 'model.onnx')
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata['mean']) == pytest.approx([77.84])
    assert json.loads(metadata['std']) == pytest.approx([95.89])
    assert json.loads(metadata['classes']) == list('0123456789')
    assert 'argmax' in metadata['postprocessing']
    assert json.loads(metadata['image_pipeline']) == []  # of arrays
    assert report_of(exported)['image_pipeline'] == []


@pytest.mark.parametrize('early', [True, False])
def test_a_network_above_the_limit_of_protobuf(
    checkpoint, tmp_path, fails, monkeypatch, early
):
    monkeypatch.setattr(onnx_model, 'LIMIT', 8000 if early else 20000)
    line = fails(
        export_command, CONFIG, checkpoint, '--out', tmp_path / 'out',
        '--weights', 'int8', '--images', 0, *OPTIONS,
    )  # fmt: skip
    assert 'model.onnx: expected at most' in line and 'protobuf' in line
    assert tree(tmp_path) == []


def test_integer_kernels(network, checkpoint, tmp_path):
    lines = []
    report = export_module.export(
        network, checkpoint, tmp_path / 'out', 'int8', 'int8', 64,
        say=lines.append,
    )  # fmt: skip
    layers = report['onnx']['integer_layers']
    assert len(layers) == 8 and set(layers.values()) == {'QLinearConv'}
    assert report['onnx']['float_layers'] == {}
    assert any('8 of 8 quantized products run in integer' in s for s in lines)
    agreement = report['agreement']['model.onnx']
    assert agreement['same_class'] > 50
    # of codes that were not compared nothing is said
    assert not set(verify.OF_CODES) & set(agreement)
    assert 'holds' not in agreement and not agreement['codes_compared']


def old_export(folder):
    """What an export of early versions leaves, and a note of the user."""
    folder.mkdir()
    for name in FILES:
        (folder / name).write_text('old')
    (folder / REPORT).write_text('{"mmauxq_version": "0"}')
    (folder / 'notes.txt').write_text('a note')
    return folder


def state_of(folder):
    """old, new or mixed, as the checksums of the report say."""
    texts = {(folder / name).read_bytes() for name in FILES if name != REPORT}
    if texts == {b'old'}:
        return 'old'
    found = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in FILES
        if name != REPORT
    }
    return 'new' if report_of(folder).get('sha256') == found else 'mixed'


def test_an_export_that_is_killed_at_any_moment(
    network, checkpoint, tmp_path, monkeypatch
):
    """In the folder of an earlier one, which is also the working directory."""
    out = old_export(tmp_path / 'out')
    monkeypatch.chdir(out)

    def export(folder):
        export_module.export(
            network, checkpoint, folder, images=0, say=lambda _: 0
        )

    with snapshots(out, tmp_path / 'kills') as kills:
        export('.')
    states = [state_of(kill) for kill in kills]
    assert len(states) > 30 and set(states) == {'old', 'mixed', 'new'}
    assert states.count('mixed') == 4 and states[-1] == 'new'
    for kill in kills:
        assert (kill / 'notes.txt').read_text() == 'a note'
    # the same command goes on, as another process would
    monkeypatch.setattr(files, '_PROCESS', 'another0')
    mixed = kills[states.index('mixed') + 1]
    assert files.left_over(mixed)
    monkeypatch.chdir(mixed)
    export('.')
    for folder in (out, mixed):
        names = {file.name for file in folder.iterdir()}
        assert names == {*FILES, 'notes.txt'} and state_of(folder) == 'new'
        onnx.checker.check_model(onnx.load(folder / 'model.onnx'))


def test_a_first_export_that_was_killed_goes_on(
    checkpoint, tmp_path, exported, monkeypatch
):
    """Between the first file and the last: no report says whose they are."""
    out = tmp_path / 'out'
    out.mkdir()
    monkeypatch.setattr(files, '_PROCESS', 'another0')
    files._begin_part(out / files.HIDDEN).mkdir()
    monkeypatch.undo()
    shutil.copy(exported / 'slim.pth', out)
    args = [CONFIG, checkpoint, '--out', out, '--images', 0, *OPTIONS]
    assert export_command([str(a) for a in args]) == 0
    assert {p.name for p in out.iterdir()} == set(FILES)


@pytest.mark.parametrize(
    'module, writer, file',
    [
        (checkpoints, 'slim_checkpoint', 'slim.pth'),
        (checkpoints, 'write_packed', 'packed.safetensors'),
        (export_module, 'write_atomically', 'model.onnx'),
    ],
    ids=['slim', 'packed', 'onnx'],
)
def test_a_full_disk_is_one_line(
    network, checkpoint, tmp_path, monkeypatch, module, writer, file
):
    out = old_export(tmp_path / 'out')
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    write = getattr(module, writer)

    def limited(*args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            return write(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(module, writer, limited)
    with pytest.raises(
        TrainingError, match=f'{file} cannot be written: File too large'
    ):
        export_module.export(
            network, checkpoint, out, images=0, say=lambda _: 0
        )
    assert tree(tmp_path) == sorted(
        ['out', *(f'out/{name}' for name in [*FILES, 'notes.txt'])]
    )
    assert state_of(out) == 'old'


def test_a_runtime_that_refuses_the_type_is_not_silent(
    network, checkpoint, tmp_path, monkeypatch
):
    session = runtime.session

    def refuse(model, *args, **kwargs):
        if model.opset_import[0].version >= 25:
            raise UsageError('onnxruntime 0 refuses the model')
        return session(model, *args, **kwargs)

    monkeypatch.setattr(runtime, 'session', refuse)
    lines = []
    report = export_module.export(
        network, checkpoint, tmp_path / 'out', images=0, say=lines.append
    )
    note = 'onnxruntime 0 refuses the model; fell back to the int8 container'
    assert f'warning: {note}' in lines
    assert report['onnx']['notes'] == [note]
    assert report['onnx']['weights'] == 'int8'
    assert note in (tmp_path / 'out' / 'report.md').read_text()


def test_batch_norm_is_estimated_anew(network, checkpoint, tmp_path):
    lines = []
    norm = network.architecture.backbone.layer1[0].bn1
    before = norm.running_mean.clone()
    report = export_module.export(
        network, checkpoint, tmp_path / 'out', images=599, batch_norm=5,
        say=lines.append,
    )  # fmt: skip
    assert lines[0].startswith('batch norm: 5 batches, top-1 ')
    norms = report['batch_norm']
    assert norms['batches'] == 5 and norms['top1_before'] is not None
    assert norms['top1_after'] == report['agreement']['slim.pth']['top1']
    assert not torch.equal(norm.running_mean, before)
    state = torch.load(tmp_path / 'out' / 'slim.pth', weights_only=True)
    assert torch.equal(
        state['state_dict']['backbone.layer1.0.bn1.running_mean'],
        norm.running_mean,
    )


# --- bad input -------------------------------------------------------------


def tree(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob('*'))


def test_a_failure_leaves_the_folder_as_it_was(
    exported, checkpoint, tmp_path, fails, monkeypatch
):
    out = old_export(tmp_path / 'out')
    before = tree(tmp_path)
    wrong = verify.Agreement(unexplained=3, largest_logit=1.0)
    monkeypatch.setattr(verify, 'compare', lambda *args: wrong)
    line = fails(
        export_command, CONFIG, checkpoint, '--out', out, '--images', 8,
        *OPTIONS,
    )  # fmt: skip
    assert 'model.onnx differs from PyTorch: 3 codes' in line
    assert tree(tmp_path) == before and state_of(out) == 'old'


@pytest.mark.parametrize(
    'kind, message',
    [
        ('model', 'out, which holds model.onnx but no report.json of an'),
        ('inside', 'out/slim.pth is not a file'),
        ('file', '--out: expected a folder, got the file'),
        ('link', '--out: expected a folder, got the dangling link'),
        ('under a file', 'cannot be written: Not a directory'),
    ],
)
def test_a_folder_that_cannot_be_used(
    checkpoint, tmp_path, fails, kind, message
):
    out = tmp_path / 'out'
    if kind == 'model':
        out.mkdir()
        (out / 'model.onnx').write_text('of the user')
        (out / 'report.json').write_text('{"mine": 1}')
    elif kind == 'inside':
        (out / 'slim.pth').mkdir(parents=True)
    elif kind == 'link':
        out.symlink_to('nowhere')
    else:
        out.write_text('a note')
    before = tree(tmp_path)
    if kind == 'under a file':
        out = out / 'deep'
    args = [CONFIG, checkpoint, '--out', out, '--images', 0, *OPTIONS]
    assert message in fails(export_command, *args)
    assert tree(tmp_path) == before


def uncalibrated(state):
    for name in state:
        if name.endswith('conv2.input_quantizer.calibrated'):
            state[name] = torch.zeros_like(state[name])
    return state


def without_quantizers(state):
    return {k: v for k, v in state.items() if '_quantizer.' not in k}


def of_another(state):
    return {'backbone.conv1.weight': torch.zeros(1)}


@pytest.mark.parametrize(
    'change, message',
    [
        (uncalibrated, '3 quantizers have no calibrated scale, such as '
         'backbone.layer1.0.conv2.input_quantizer'),
        (without_quantizers, 'expected a quantized network, got a float one'),
        (of_another, 'expected a checkpoint of this architecture'),
        (None, 'none.pth does not exist'),
    ],
)  # fmt: skip
def test_a_checkpoint_that_cannot_be_used(
    checkpoint, tmp_path, fails, change, message
):
    file = tmp_path / 'none.pth'
    if change is not None:
        state = torch.load(checkpoint, weights_only=True)['state_dict']
        file = tmp_path / 'changed.pth'
        torch.save(dict(state_dict=change(state)), file)
    before = tree(tmp_path)
    line = fails(
        export_command, CONFIG, file, '--out', tmp_path / 'out', *OPTIONS
    )
    assert message in line and str(file) in line
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    'args, message',
    [
        (['--residual', 'int8'], '--residual int8 is for integer kernels'),
        (
            ['--images', 'x'],
            "argument --images: expected an integer from 0, got 'x'",
        ),
        (['--weights', 'int2'], "invalid choice: 'int2'"),
    ],
)
def test_arguments(checkpoint, tmp_path, fails, args, message):
    args = [CONFIG, checkpoint, '--out', tmp_path / 'out', *args, *OPTIONS]
    assert message in fails(export_command, *args)
    assert tree(tmp_path) == []


def test_a_float_network_is_refused(checkpoint, tmp_path, fails, root):
    line = fails(
        export_command, root / 'configs/float_r20_digits.py', checkpoint,
        '--out', tmp_path / 'out',
    )  # fmt: skip
    assert "model.type: expected 'mmauxq.JointQAT'" in line


def test_codes_that_no_type_holds(small_config, tmp_path, fails):
    """DoReFa's 8-bit weights have the codes -255 to 255."""
    from mmauxq.deploy.network import calibrated_network

    cfg = copy.deepcopy(small_config)
    cfg.model.quantizers.weight = dict(type='mmauxq.DoReFaWeight', bits=8)
    state = calibrated_network(cfg).algorithm.state_dict()
    torch.save(dict(state_dict=state), tmp_path / 'dorefa.pth')
    line = fails(
        export_command, CONFIG, tmp_path / 'dorefa.pth', '--images', 0,
        '--out', tmp_path / 'out', *OPTIONS,
        'model.quantizers.weight.type=mmauxq.DoReFaWeight',
        'model.quantizers.weight.bits=8',
    )  # fmt: skip
    assert 'codes from -255 to 255 fit none of int2, int4, int8' in line
    assert tree(tmp_path) == ['dorefa.pth']


def test_the_report_names_what_would_help(small_config, tmp_path):
    """Of an 8-bit network, whose kernels may saturate elsewhere."""
    from mmauxq.deploy.network import calibrated_network

    cfg = copy.deepcopy(small_config)
    for role in ('weight', 'activation'):
        cfg.model.quantizers[role].bits = 8
    network = calibrated_network(cfg)
    for name, quantizer in named_quantizers(network.architecture):
        if name.endswith('weight_quantizer'):
            quantizer.step.data *= 0.1  # so that all codes are in use
    state = network.algorithm.state_dict()
    torch.save(dict(state_dict=state), tmp_path / 'w8a8.pth')
    report = export_module.export(
        network, tmp_path / 'w8a8.pth', tmp_path / 'out', 'int8', images=0,
        say=lambda _: 0,
    )  # fmt: skip
    first, second = 'backbone.layer1.0.conv1', 'backbone.layer1.0.conv2'
    about = report['onnx']
    assert first in about['saturating_layers']
    assert set(about['saturating_layers']) <= set(about['integer_layers'])
    assert '--residual int8 quantizes' in about['float_layers'][second]
    page = (tmp_path / 'out' / 'report.md').read_text()
    assert f'* `{first}`: two products of its codes may not fit' in page
    assert f'* `{second}` runs in float: its result goes on in flo' in page


@pytest.mark.parametrize('weights', ['typed', 'int8'])
def test_activations_of_16_bits(small_config, tmp_path, weights):
    from mmauxq.deploy.network import calibrated_network

    cfg = copy.deepcopy(small_config)
    cfg.model.quantizers.weight.bits = 4
    cfg.model.quantizers.activation.bits = 16
    network = calibrated_network(cfg)
    state = network.algorithm.state_dict()
    torch.save(dict(state_dict=state), tmp_path / 'w4a16.pth')
    report = export_module.export(
        network, tmp_path / 'w4a16.pth', tmp_path / 'out', weights,
        images=100, say=lambda _: 0,
    )  # fmt: skip
    agreement = report['agreement']['model.onnx']
    assert agreement['codes'] > 100_000 and not agreement['unexplained']
    assert agreement['same_class'] == 100
    model = onnx.load(tmp_path / 'out' / 'model.onnx')
    kinds = {v.name: v.data_type for v in model.graph.initializer}
    zeros = [
        kinds[node.input[2]]
        for node in model.graph.node
        if node.op_type == 'QuantizeLinear'
    ]
    assert set(zeros) == {onnx.TensorProto.UINT16}
    if weights == 'int8':
        assert set(report['onnx']['float_layers'].values()) == {
            'its input has more than 8 bits'
        }


def test_images_are_what_the_runtime_saw(exported, network):
    """The file alone, as a user runs it."""
    images, _ = network.images(16)[0]
    with torch.no_grad():
        expected = network.architecture(images, mode='tensor').numpy()
    running = runtime.session(onnx.load(exported / 'model.onnx'))
    logits = running.run(['logits'], {'images': images.numpy()})[0]
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()
