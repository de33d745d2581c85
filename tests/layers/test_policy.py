import pytest

from mmauxq.errors import UsageError
from mmauxq.layers import LayerBits, Policy
from mmauxq.layers.policy import match

NAMES = [
    'backbone.conv1',
    'backbone.layer1.0.conv1',
    'backbone.layer1.0.conv2',
    'backbone.layer2.0.conv1',
    'head.fc',
]


def widths(policy, names=NAMES, weight=2, activation=3):
    """(weight, activation) of each layer, in order."""
    bits = policy.assign(names, weight, activation)
    assert list(bits) == list(names)
    return [(b.weight, b.activation) for b in bits.values()]


def test_first_and_last_stay_float():
    inner = [(2, 3)] * 3
    assert widths(Policy()) == [(32, 32), *inner, (32, 32)]


def test_first_and_last_get_the_bits_they_are_given():
    found = widths(Policy(first=8, last=4))
    assert (found[0], found[-1]) == ((8, 8), (4, 4))


def test_all_layers_of_the_head_are_the_classifier():
    names = ['conv1', 'conv2', 'head.fc1', 'head.fc2']
    assert widths(Policy(last=8), names)[2:] == [(8, 8), (8, 8)]


def test_the_order_of_running_does_not_matter_to_the_head():
    names = ['conv1', 'head.fc', 'conv2']
    assert widths(Policy(last=8), names) == [(32, 32), (8, 8), (2, 3)]


def test_without_a_head_the_last_layer_is_the_classifier():
    names = ['conv1', 'conv2', 'conv3']
    assert widths(Policy(last=8), names) == [(32, 32), (2, 3), (8, 8)]


def test_a_header_is_not_a_head():
    names = ['conv1', 'header.conv', 'fc']
    assert widths(Policy(), names)[1] == (2, 3)


@pytest.mark.parametrize(
    'layers, expected',
    [
        ({'*.layer1.*': 4}, [(4, 4), (4, 4), (2, 3)]),
        ({'*.conv2': 32}, [(2, 3), (32, 32), (2, 3)]),
        ({'*.layer?.0.conv1': 4}, [(4, 4), (2, 3), (4, 4)]),
        ({'*.conv2': dict(weight=8)}, [(2, 3), (8, 3), (2, 3)]),
        ({'*.conv2': dict(activation=8)}, [(2, 3), (2, 8), (2, 3)]),
        (
            {'*.conv2': dict(weight=5, activation=6)},
            [(2, 3), (5, 6), (2, 3)],
        ),
        ({'*.layer1.*': 4, '*.conv2': 8}, [(4, 4), (8, 8), (2, 3)]),
        ({'*.conv2': 8, '*.layer1.*': 4}, [(4, 4), (4, 4), (2, 3)]),
        (
            {'*.conv2': 8, '*.layer1.*': dict(weight=4)},
            [(4, 3), (4, 8), (2, 3)],
        ),
    ],
)
def test_patterns_the_last_match_wins(layers, expected):
    assert widths(Policy(layers=layers))[1:-1] == expected


def test_patterns_win_over_first_and_last():
    found = widths(Policy(first=8, last=8, layers={'*': 4}))
    assert found == [(4, 4)] * 5


def test_every_layer_says_why_it_has_its_bits():
    bits = Policy(layers={'*.conv2': 8}).assign(NAMES, 2, 2)
    assert [b.reason for b in bits.values()] == [
        'first layer',
        '',
        "policy '*.conv2'",
        '',
        'classifier',
    ]


def test_a_pattern_that_matches_nothing_lists_what_exists():
    with pytest.raises(UsageError) as error:
        Policy(layers={'layer9.*': 4}).assign(NAMES, 2, 2)
    assert str(error.value) == (
        "model.policy.layers: expected a pattern of names, got 'layer9.*', "
        'which matches nothing; there are 5: ' + ', '.join(NAMES)
    )


def test_a_long_list_is_cut():
    names = [f'conv{i}' for i in range(30)]
    with pytest.raises(UsageError) as error:
        match('fc', names, 'taps')
    assert str(error.value) == (
        "taps: expected a pattern of names, got 'fc', which matches nothing; "
        'there are 30: ' + ', '.join(names[:20]) + ', ...'
    )


def test_patterns_heed_the_case():
    with pytest.raises(UsageError, match='matches nothing'):
        match('CONV*', ['conv1'], 'pattern')


@pytest.mark.parametrize(
    'arguments, where, value, most',
    [
        (dict(first=0), 'policy.first', 0, 8),
        (dict(last=9), 'policy.last', 9, 8),
        (dict(layers={'*.fc': '4'}), "policy.layers['*.fc']", '4', 8),
        (dict(layers={'*': dict(weight=16)}), "policy.layers['*']", 16, 8),
        (dict(layers={'*': dict(activation=0)}), "policy.layers['*']", 0, 16),
    ],
)
def test_bad_bits(arguments, where, value, most):
    with pytest.raises(UsageError) as error:
        Policy(**arguments)
    assert str(error.value) == (
        f'{where}: expected bits from 1 to {most}, or 32 for floating point, '
        f'got bits={value!r}'
    )


@pytest.mark.parametrize('bits', [{}, {'weights': 4}, {'bias': 8}])
def test_bad_keys(bits):
    with pytest.raises(UsageError) as error:
        Policy(layers={'*': bits})
    assert str(error.value) == (
        "policy.layers['*']: expected the keys 'weight' and 'activation', "
        f'got {bits}'
    )


@pytest.mark.parametrize(
    'weight, activation, is_float',
    [(32, 32, True), (4, 32, False), (32, 4, False), (4, 4, False)],
)
def test_float_means_both_operands(weight, activation, is_float):
    assert LayerBits(weight, activation, '').is_float is is_float


def test_patterns_as_pairs():
    """As the command line gives them."""
    policy = Policy(layers=[('a.*', 8), ['b', 4]])
    assert policy.layers == {'a.*': 8, 'b': 4}


@pytest.mark.parametrize('layers', ['a=8', 7, [1, 2], [('a',)]])
def test_patterns_of_another_form(layers):
    with pytest.raises(UsageError, match='expected a dict or a list of pairs'):
        Policy(layers=layers)
