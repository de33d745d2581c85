"""What docs/lookup.py makes of the code, and what the pages quote of it."""

import ast
import inspect
import re

import pytest

import mmauxq
from docs import lookup
from docs.lookup import Key
from mmauxq import cli
from mmauxq.accelerate import Speed
from mmauxq.engine.config_validation import own_names
from mmauxq.layers import Policy

PACKAGE = lookup.ROOT / 'mmauxq'
# not what other tests of this process have registered
OWN = {
    name: cls
    for name, cls in own_names().items()
    if cls.__module__.startswith('mmauxq.')
}


def keys(name):
    return {key.name: key for key in lookup.keys_of(OWN[name])}


# --- config keys -------------------------------------------------------------


def test_a_key():
    assert keys('mmauxq.GuidanceWeightHook')['begin'] == Key(
        'begin', 'float', '0.0',
        'Part of the training, 0 to 1, at which the change begins.',
    )  # fmt: skip


@pytest.mark.parametrize('name', OWN)
def test_each_key_has_a_meaning_of_its_own(name):
    for key in keys(name).values():
        assert key.meaning and not key.meaning.startswith('See'), key
        assert '\n.. ' not in key.meaning and '\n:' not in key.meaning


def test_keys_are_those_that_the_command_takes():
    """What the builder adds is left out, what it reads itself is there."""
    assert list(keys('mmauxq.LSQ')) == ['bits', 'per_channel']
    assert list(keys('mmauxq.DoReFaWeight')) == ['bits']
    found = keys('mmauxq.AuxAdaptorAggregator')
    assert 'num_classes' not in found
    assert found['taps'].default == "'auto'"
    assert keys('mmauxq.KnowledgeDistillation')['taps'].default == 'None'
    assert not keys('mmauxq.collated')


def test_a_meaning_comes_from_the_base_that_has_it():
    found = keys('mmauxq.IntermediateClassifiers')
    assert found['loss_weight'].meaning.startswith('Factor on all losses')
    assert found['loss_weight'].meaning.endswith('(``GuidanceWeightHook``).')
    assert keys('mmauxq.EpochLoop')['max_epochs'] == Key(
        'max_epochs', 'int', 'needed',
        "As of MMEngine's ``EpochBasedTrainLoop``.",
    )  # fmt: skip


def test_types_and_defaults():
    def example(a: 'int', b: dict | None = None, *c, d=(1,) * 99): ...

    a, b, _, d = inspect.signature(example).parameters.values()
    assert lookup.type_name(b.annotation) == 'dict | None'
    assert lookup.type_name(d.annotation) == ''
    shown = [lookup.default_name(x.default) for x in (a, b, d)]
    assert shown == ['needed', 'None', '...']
    layers = lookup.keys_of(Policy)[-1]
    assert (layers.name, layers.type) == ('layers', 'dict | Sequence')
    assert layers.default == '{}'


def test_the_text_of_a_class():
    text = lookup.config_text(Speed)
    assert text.startswith('How a training step is run.')
    assert 'Raises' not in text and 'Args' not in text
    assert '   * - ``memory``\n     - ``str | None``\n     - ``None``' in text
    assert text.endswith('``None`` for where\n       there is a GPU.')


def test_the_page_has_all_registered_classes():
    page = (lookup.ROOT / 'docs/config.md').read_text()
    asked = re.findall(r'\{config-keys\} (\S+)', page)
    assert len(asked) == len(set(asked))
    for name, cls in OWN.items():
        places = [
            place
            for place in asked
            if place == name or f'{cls.__module__}.'.startswith(f'{place}.')
        ]
        assert len(places) == 1, name


# --- commands ----------------------------------------------------------------


@pytest.mark.parametrize('name', cli.COMMANDS)
def test_each_option_says_what_it_does(name):
    options = dict(lookup.options_of(name))
    assert all(options.values())
    assert '--debug' in options and '-h, --help' not in options
    assert f'usage: mmauxq {name} ' in lookup.command_text(name)


def test_options():
    options = dict(lookup.options_of('export'))
    assert options['--out DIR'] == 'folder'
    assert options['--residual {float,int8}'].endswith('(default: float)')
    # the default that the help says itself is not said again
    assert options['--images N'].count('default') == 1
    assert options['checkpoint'] == 'training checkpoint or slim one'


# --- results -----------------------------------------------------------------


def test_results():
    rows = {row[0]: row for row in lookup.results('Digits')}
    assert rows['``qat_r20_w2a2_digits``'] == [
        '``qat_r20_w2a2_digits``', '97.63 ± 0.51'.replace(' ', '\xa0'), '5',
        '``float_r20_digits``', '-0.83',
        '``digits_w2a2_20_epochs.jsonl``', '',
    ]  # fmt: skip
    assert rows['``float_r8_digits``'][3:5] == ['', '']
    assert 'qat_r20_w2a2_fmnist' not in str(rows)
    assert lookup.results('ImageNet-1k') == []


def test_a_difference_is_to_the_float_networks_of_the_runs():
    rows = {row[0]: row for row in lookup.results('Fashion-MNIST')}
    assert rows['``qat_r20_w4a8_fmnist``'][3:5] == [
        '``float_r20_fmnist``', '+0.39',
    ]  # fmt: skip
    # records of before say only the file that they started from
    assert rows['``qat_r56_w2a2_fmnist``'][4] == '-0.28'


# --- reStructuredText --------------------------------------------------------


def test_a_table_of_cells_with_several_lines():
    assert lookup.list_table(['a', 'b'], [['1', 'two\nlines']], [20, 80]) == (
        '.. list-table::\n   :header-rows: 1\n   :class: names\n'
        '   :widths: 20 80\n\n'
        '   * - a\n     - b\n'
        '   * - 1\n     - two\n       lines'
    )


# --- links -------------------------------------------------------------------


def test_links_lead_on_the_site_where_they_lead_on_github():
    page = '[a](../README.md#install) [b](../../CHANGELOG.md) [c](map.md#x)'
    assert lookup.on_site(page) == (
        '[a](/readme.md#install) [b](/changelog.md) [c](map.md#x)'
    )
    readme = '![a](docs/a.png) [b](setup.py) [c](#d) [e](https://f) '
    assert lookup.on_site(f'{readme}[g](CONTRIBUTING.md#h)', True) == (
        '![a](a.png) [b](../setup.py) [c](#d) [e](https://f) '
        '[g](/contributing.md#h)'
    )


# --- pages written by hand ---------------------------------------------------


def test_messages_of_the_page_are_those_of_the_code():
    """A part of each line that the page shows is written in the package."""
    page = (lookup.ROOT / 'docs/troubleshooting.md').read_text()
    shown = re.findall(r'^```text\n(.*)\n```$', page, re.M)
    shown += re.findall(r'^\| `([^`]{30,})` \|', page, re.M)
    assert len(shown) > 40
    parts = {
        node.value
        for file in [*PACKAGE.rglob('*.py')]
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    starts = {part[:25] for part in parts if len(part) > 17}
    scripts = (lookup.ROOT / 'tools/setup_env.sh').read_text()
    for line in shown:
        known = any(start in line for start in starts)
        assert known or line[-30:] in scripts, line


def test_the_public_functions_are_described():
    for name in mmauxq.API:
        doc = inspect.getdoc(getattr(mmauxq, name))
        assert 'Args:' in doc, name
