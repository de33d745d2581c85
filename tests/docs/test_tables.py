"""The tables of the pages, which docs/tables makes from records."""

import json
import sys

import pytest

from docs.tables import __main__ as command
from docs.tables import pages, records, scaling, speed
from tests.conftest import ROOT

PAGES = {
    str(page.relative_to(ROOT)): page
    for page in pages.pages()
    if list(pages.blocks(page.read_text()))
}


@pytest.mark.parametrize('name', PAGES)
def test_the_tables_are_those_of_the_records(name):
    for indent, table, shown in pages.blocks(PAGES[name].read_text()):
        assert shown == pages.made(indent, table), table


def test_every_table_is_on_a_page():
    shown = {
        name
        for page in PAGES.values()
        for _, name, _ in pages.blocks(page.read_text())
    }
    assert shown == set(pages.TABLES)


@pytest.mark.parametrize('name', PAGES)
def test_every_page_names_the_command_and_ends_each_block(name):
    text = PAGES[name].read_text()
    assert 'python -m docs.tables' in text
    assert text.count('<!-- table: ') == text.count('<!-- end -->')
    assert text.count('<!-- table: ') == len(list(pages.blocks(text)))


@pytest.fixture
def page(tmp_path, monkeypatch):
    """One with a table of a single number, and the command in its place."""
    monkeypatch.setattr(pages, 'TABLES', {'one': lambda: '| 1 |\n'})
    monkeypatch.setattr(records, 'DOCS', tmp_path / 'docs')
    monkeypatch.setattr(command, 'DOCS', tmp_path / 'docs')
    page = tmp_path / 'page.md'
    page.write_text('a\n  <!-- table: one -->\n  | 2 |\n  <!-- end -->\nb\n')
    monkeypatch.setattr(command, 'pages', lambda: [page])
    return page


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['docs.tables', *arguments])
    return command.main()


def test_check_names_what_is_stale_and_writes_nothing(
    page, monkeypatch, capsys
):
    before = page.read_text()
    assert run(monkeypatch, '--check') == 1
    assert capsys.readouterr().out == 'page.md: one\n'
    assert page.read_text() == before


def test_a_page_is_written_as_it_is_indented(page, monkeypatch, capsys):
    assert run(monkeypatch) == 0
    assert page.read_text() == (
        'a\n  <!-- table: one -->\n  | 1 |\n  <!-- end -->\nb\n'
    )
    capsys.readouterr()
    assert run(monkeypatch, '--check') == 0
    assert capsys.readouterr().out == ''


# --- rows that come later ----------------------------------------------------


@pytest.fixture
def logs(tmp_path, monkeypatch):
    """A folder of records of its own; returns what writes rows there."""
    monkeypatch.setattr(records, 'LOGS', tmp_path)

    def write(name, rows):
        lines = [json.dumps(row) + '\n' for row in rows]
        (tmp_path / name).write_text(''.join(lines))

    return write


def runner_row(what, ms, **more):
    return dict(
        arm=f'runner/r18/{what}/plain/32', network='r18', what=what,
        form='plain', batch=32, ms=ms, repeats=10, **more,
    )  # fmt: skip


def test_another_host_is_another_row(logs):
    logs(
        speed.RUNNER,
        [
            runner_row('mmpretrain', 10.0, host='a'),
            runner_row('w4a4', 4.0, host='a', low=3.5, high=4.5),
            runner_row('mmpretrain', 10.0, host='b'),
            runner_row('w4a4', 9.0, host='b'),
            runner_row('w4a4', 5.0, host='b'),  # the last one counts
            runner_row('new', 6.0, host='b'),
            dict(
                runner_row('w4a4', 30.0, host='b'),
                arm='runner/r18/w4a4/plain/256', batch=256,
            ),
        ],
    )  # fmt: skip
    assert speed.other_iterations().splitlines()[2:] == [
        '| ResNet-18, batches of 256 | W4A4 | b | 30.0 |'
    ]
    assert speed.card('r18').splitlines()[2:] == [
        '| a | 0.40 |  |',
        '| b | 0.50 | 0.60 |',
        '| aim | 0.45 |  |',
        '| hosts that meet the aim | 1 of 2 |  |',
    ]
    assert speed.iterations('r18').splitlines() == [
        "| host | iterations | MMPretrain's, float | W4A4 | `new/plain` |",
        '| --- | --- | --- | --- | --- |',
        '| a | 10 | 10.0 | 4.00 (3.50 to 4.50) |  |',
        '| b | 10 | 10.0 | 5.00 | 6.00 |',
    ]


def test_the_fastest_row_of_a_step_counts(logs):
    step = dict(
        arm='step/r50/w4a4/graphed/256', network='r50', what='w4a4',
        form='graphed', batch=256,
    )  # fmt: skip
    logs(
        speed.STEPS,
        [dict(step, ms=3.0), dict(step, ms=2.0), dict(step, error='no')],
    )
    assert speed.steps('r50', 256) == {'w4a4/graphed': dict(step, ms=2.0)}


def test_the_efficiency_is_beside_one_gpu_of_the_host(logs):
    def row(gpus, speed, host, wrapper='RecordedDDP', **more):
        return dict(
            arm=f'scaling/r18/aux/graphed/32/{gpus}', network='r18',
            what='aux', form='graphed', batch=32, gpus=gpus, ms=8.0,
            images_per_s=speed, host=host, wrapper=wrapper, **more,
        )  # fmt: skip

    parts = dict(computing=5.0, all_reduce=0.25, sync_bn=0.0, idle=2.0)
    logs(
        scaling.SCALING,
        [
            row(1, 1000.0, 'a'),
            row(2, 1800.0, 'a', split=parts),
            row(2, 4000.0, 'b', split=None),
            row(2, 500.0, 'a', wrapper='DDP'),
        ],
    )
    name = 'ResNet-18, W4A4 with the module, `graphed`, batch 32'
    ours, theirs = f'| {name} | `RecordedDDP`', f'| {name} | `DDP`'
    assert scaling.several_gpus().splitlines()[2:] == [
        f'{ours} | a | 1 | 1,000 | 1.00 | 8.00 |  |  |  |  |',
        f'{ours} | a | 2 | 1,800 | 0.90 | 8.00 | 5.00 | 0.25 | 0 | 2.00 |',
        f'{ours} | b | 2 | 4,000 |  | 8.00 |  |  |  |  |',
        f'{theirs} | a | 2 | 500 |  | 8.00 |  |  |  |  |',
    ]


def test_without_rows_of_several_gpus_nothing_is_claimed(logs):
    assert scaling.several_gpus().splitlines()[2].startswith('| not yet run |')


@pytest.mark.parametrize(
    'value, text',
    [(0.19407, '0.194'), (4235.9, '4,240'), (5.97, '5.97'), (39.8, '39.8'),
     (9.996, '10.0'), (None, '')],
)  # fmt: skip
def test_numbers_have_three_digits(value, text):
    assert records.number(value) == text
