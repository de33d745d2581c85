import pytest

from benchmarks.names import ARMS, chosen
from mmauxq.errors import UsageError


def test_names_are_chosen_by_pattern():
    everything = chosen([])
    assert everything == ARMS
    assert len(set(everything)) == len(everything) > 40
    names = chosen(['step/r50/w4a4/*/256', 'ops/activations'])
    assert 'step/r50/w4a4/recompute/256' in names
    assert names[-1] == 'ops/activations'


def test_other_batch_sizes_are_measured_as_well():
    sized = [name for name in ARMS if not name.startswith('epoch/')]
    others = [name + '7' for name in sized if name[-1].isdecimal()]
    assert len(others) > 70
    assert chosen(others) == others
    more = ['ops/weights/r34', 'loader/r50/all', 'epoch/r8']
    more += ['loader/r18/1/dali']
    assert chosen(more) == more


def test_the_commands_of_the_readme_are_measured():
    assert chosen(['runner/r18/*/32']) == [
        'runner/r18/mmpretrain/plain/32',
        'runner/r18/w4a4/plain/32',
        'runner/r18/aux/plain/32',
        'runner/r18/aux/eager/32',
    ]


@pytest.mark.parametrize(
    'name', ['stop/*', 'nix', 'ops/nix', 'step/r18/w4a4/eager',
             'step/r18/w4a4/eager/0', 'scaling/r18/w4a4/plain/2/4',
             'loader/r18/0', 'epoch/r50', 'loader/r18/1/opencv/2'],
)  # fmt: skip
def test_what_is_no_name(name):
    with pytest.raises(
        UsageError, match='--only: expected names .*, got '
    ) as e:
        chosen([name])
    assert str(e.value).endswith(repr(name))


@pytest.mark.parametrize(
    'name, word',
    [
        ('step/r18/w4a4/slow/2', 'slow'),
        ('step/r18/w3a3/eager/2', 'w3a3'),
        ('runner/r18/w4a4/chained/2', 'chained'),
        ('scaling/r18/float/plain/2', 'float'),
        ('loader/r18/1/gif', 'gif'),
    ],
)
def test_words_that_mean_nothing(name, word):
    with pytest.raises(UsageError, match=f"expected one of .*, got '{word}'"):
        chosen([name])
