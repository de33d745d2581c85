"""The recipes that are measured."""

from mmengine.config import Config

from benchmarks.names import ARMS, STEPS
from benchmarks.recipes import recipe, write_config


def test_every_recipe_exists():
    arms = [name.split('/') for name in ARMS]
    arms = [parts for parts in arms if parts[0] in STEPS]
    assert len(arms) > 60
    for text in {recipe(what, network) for _, network, what, *_ in arms}:
        model = Config.fromstring(text, '.py').model
        ours = model.type == 'mmauxq.JointQAT'
        assert (model.architecture if ours else model).head


def test_the_peer_is_mmpretrains_own_network():
    model = Config.fromstring(recipe('mmpretrain', 'r18'), '.py').model
    assert model.type == 'ImageClassifier'


def test_the_config_of_a_run(tmp_path):
    more = 'custom_hooks = []\n'
    path = write_config(tmp_path, 'r50', 'aux-float32', 4, 80, 32, 2, more)
    cfg = Config.fromfile(path)
    assert cfg.model.guidance.type == 'mmauxq.AuxAdaptorAggregator'
    assert cfg.model.guidance.dtype == 'float32'
    assert cfg.model.float_checkpoint is None
    loader = cfg.train_dataloader
    assert (loader.batch_size, loader.dataset.length) == (4, 80)
    assert loader.dataset.type == 'mmauxq.GeneratedImages'
    assert loader.pin_memory and 1 <= loader.num_workers <= 8
    assert cfg.default_hooks.logger.interval == 100
    assert cfg.custom_hooks == [] and cfg.val_cfg is None


def test_the_float_network_in_a_run(tmp_path):
    model = Config.fromfile(write_config(tmp_path, 'r18', 'float', 2, 4, 32))
    bits = model.model.quantizers
    assert (bits.weight.bits, bits.activation.bits) == (32, 32)
