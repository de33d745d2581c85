import json

from benchmarks.coverage.row import (
    Row,
    as_json_lines,
    as_markdown,
    from_json_lines,
)


def test_the_table_tells_all():
    rows = [
        Row('a.py', 'A', 'pass', taps=2, layouts=['map']),
        Row('b.py', 'B', 'fail', 'why', kept={'x.fc': 'read elsewhere'}),
    ]
    text = as_markdown(rows)
    assert '| A | a.py |' in text and '2 (map)' in text
    assert '1 of 2 pass.' in text
    assert '* b.py: fail, why' in text
    assert '* b.py: float are x.fc: read elsewhere' in text
    lines = as_json_lines(rows).splitlines()
    assert [json.loads(line)['verdict'] for line in lines] == ['pass', 'fail']
    again = from_json_lines(as_json_lines(rows))
    assert as_markdown(again) == text


def test_notes_add_up():
    row = Row('x.py')
    row.note('tried otherwise')
    row.note('why')
    assert row.reason == 'tried otherwise; why'
