from mmauxq.text import percent, table


def test_a_table():
    assert table(
        ['name', 'ms', ''], [['a', 1.5, 'x'], ['b', 2, '']], 'lr'
    ) == (
        '| name | ms |  |\n'
        '| --- | ---: | --- |\n'
        '| a | 1.5 | x |\n'
        '| b | 2 |  |\n'
    )


def test_percent():
    assert [percent(0.97306), percent(1), percent(None)] == [
        '97.31%', '100.00%', 'unknown'
    ]  # fmt: skip
