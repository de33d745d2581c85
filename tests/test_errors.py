"""Messages in one line."""

import os

import pytest

from mmauxq.errors import (
    TrainingError,
    UsageError,
    check_integer,
    check_number,
    one_line,
    shorten,
    visible,
)


@pytest.mark.parametrize(
    'error, line',
    [
        (UsageError('a\n  b'), 'a b'),
        (TrainingError('it ended'), 'it ended'),
        (KeyError('lr'), "missing key 'lr'"),
        (KeyError('no lr in it'), 'no lr in it'),
        (ValueError('x'), 'ValueError: x'),
        (ValueError('x' * 700), 'ValueError: ' + 'x' * 585 + '...'),
    ],
)
def test_errors_are_one_line(error, line):
    assert one_line(error) == line


def test_long_values_are_cut():
    assert shorten({'a': 'b'}) == "{'a': 'b'}"
    assert shorten(['x' * 200], 20) == "['xxxxxxxxxxxxxxx..."


@pytest.mark.parametrize('value', [0, True, '3\n', None, float('nan')])
def test_what_is_no_number_that_fits(value):
    with pytest.raises(UsageError) as error:
        check_number('a.b', value, 'a number above 0', lambda x: x > 0)
    assert str(error.value) == (
        f'a.b: expected a number above 0, got {value!r}'
    )
    check_number('a.b', 0.5, 'a number above 0', lambda x: x > 0)


@pytest.mark.parametrize('value', [0, -1, True, 1.0, '3', None, float('nan')])
def test_what_is_no_integer_from_1(value):
    with pytest.raises(UsageError) as error:
        check_integer('a.b', value, 1)
    assert str(error.value) == (
        f'a.b: expected an integer from 1, got {value!r}'
    )


def test_integers_pass():
    check_integer('a.b', 1, 1)
    check_integer('a.b', 7, -1)


@pytest.mark.parametrize(
    'text, shown',
    [
        ('plain Ünï 日本 नमस्ते', 'plain Ünï 日本 नमस्ते'),
        ('می\u200cخواهم', 'می\u200cخواهم'),  # the letters are not joined
        ('\x1b[31m', r'\x1b[31m'),
        ('a\r\n\x07b', r'a\r\n\x07b'),
        ('a\u202eb\u2066', r'a\u202eb\u2066'),
        (os.fsdecode(b'\xff'), r'\udcff'),
        ('\x9b', r'\x9b'),
    ],
)
def test_a_terminal_obeys_no_text(text, shown):
    assert visible(text) == shown


def test_controls_that_stay():
    assert visible('a\n\tb\x1b', '\n\t') == 'a\n\tb\\x1b'


def test_messages_are_visible():
    assert one_line(UsageError('a\x1b\n b')) == r'a\x1b b'
    assert one_line(MemoryError()) == 'MemoryError'
