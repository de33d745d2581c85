"""Parts of MMPretrain on a JointQAT: the tables, and two rows of them."""

import json
from functools import partial

import pytest

from benchmarks.coverage.parts import __main__ as command
from benchmarks.coverage.parts import plan as plans
from benchmarks.coverage.parts.part import (
    NOT_FOR,
    TRAIN,
    Part,
    Row,
    as_json_lines,
    as_markdown,
    from_json_lines,
)
from benchmarks.coverage.parts.registries import FAMILIES, registered_parts
from benchmarks.coverage.parts.tools import CONVERTERS, OTHERS
from benchmarks.coverage.parts.trial import Outcome, judge, try_part
from mmauxq.cli.run_command import run_command
from mmauxq.errors import UsageError

main = partial(
    run_command, command, prog='python -m benchmarks.coverage.parts'
)


def test_the_tables_know_all_that_is_installed_and_nothing_else():
    known = plans.known_parts()
    names = [part.name for part in known]
    assert len(set(names)) == len(names)
    tried = {part.registered for part in known if part.kind != 'variants'}
    assert tried == set(plans.installed_parts())
    assert {part.kind for part in known} == {*FAMILIES, 'tools', 'variants'}
    assert plans.shipped_tools().keys() >= CONVERTERS | OTHERS


def test_each_part_that_is_not_expected_to_work_says_why():
    for part in plans.known_parts():
        if part.expect != 'works':
            assert part.because, part.name
        if part.expect == NOT_FOR:
            assert part.why, part.name


def test_both_packages_are_asked():
    found = registered_parts()
    assert found['HOOKS/mmpretrain.EMAHook'].startswith('mmpretrain.')
    assert found['HOOKS/mmengine.EMAHook'].startswith('mmengine.')
    assert 'EVALUATORS/mmengine.Evaluator' in found
    assert not any('mmauxq' in source for source in found.values())


def test_a_part_that_no_table_knows_fails(tmp_path):
    known = [Part('HOOKS/mmengine.Old', TRAIN)]
    present = {'HOOKS/mmengine.New': 'mmengine.hooks'}
    trials = plans.plan(known=known, present=present)
    rows = {name: trial(tmp_path) for name, trial in trials.items()}
    new, old = rows['HOOKS/mmengine.New'], rows['HOOKS/mmengine.Old']
    assert (new.verdict, new.expected) == ('fails', False)
    assert new.reason == 'no table says how to try it'
    assert (old.reason, old.expected) == ('is not installed', False)


def test_names_are_chosen_by_pattern():
    chosen = plans.plan(['HOOKS/*.EMAHook', 'variants/text config'])
    assert list(chosen) == [
        'HOOKS/mmpretrain.EMAHook',
        'HOOKS/mmengine.EMAHook',
        'variants/text config',
    ]
    with pytest.raises(UsageError, match=r"--list.*, got 'HOOKS/No\*'"):
        plans.plan(['HOOKS/No*'])


def test_the_table_tells_all():
    rows = [
        Row('HOOKS/a.A', 'a.hooks', 'works', '', True, 3.2),
        Row('HOOKS/a.B', 'a.hooks', NOT_FOR, 'for C', True),
        Row('tools/d.py', 'a/d.py', 'needs', 'pandas', True),
        Row('tools/e.py', 'a/e.py', reason='x | y'),
    ]
    text = as_markdown(rows)
    assert '| HOOKS/a.A | a.hooks | works | 3 |' in text
    assert '| not for classifiers: for C |' in text
    assert '| needs pandas |' in text
    assert '| fails: x \\| y **(unexpected)** |' in text
    assert text.endswith(
        '\n4 rows: 1 works, 1 not for classifiers, 1 needs, 1 fails; '
        '1 unexpected.\n'
    )
    assert from_json_lines(as_json_lines(rows)) == rows


def test_the_records_of_the_docs_are_those_of_the_plan(root):
    rows = from_json_lines((root / 'docs/logs/parts.jsonl').read_text())
    assert [row.part for row in rows] == list(plans.plan())


@pytest.mark.parametrize(
    'status, errors, refusal, message',
    [
        (2, 'error: a: expected b\n', True, 'a: expected b'),
        (1, 'error: a: expected b\n', False, 'a: expected b'),
        (2, 'Traceback\nerror: a\n', False, 'a'),
        (1, 'Traceback\nKeyError: 1\n', False, 'KeyError: 1'),
        (7, '', False, 'exit status 7'),
    ],
)
def test_a_refusal_is_one_line(status, errors, refusal, message):
    outcome = Outcome(status, errors, errors)
    assert (outcome.is_refusal, outcome.message) == (refusal, message)


@pytest.mark.parametrize(
    'expect, own, theirs, verdict',
    [
        ('works', 'JointQAT: no', 'ImageClassifier: no', 'mmpretrain'),
        ('works', 'JointQAT: no', 'ImageClassifier: yes', 'fails'),
        ('works', 'JointQAT: no', '', 'fails'),
        (NOT_FOR, 'JointQAT: no', 'ImageClassifier: no', NOT_FOR),
        (NOT_FOR, 'JointQAT: no', 'another', 'fails'),
        (NOT_FOR, 'error: no', 'another', NOT_FOR),
        ('refused', 'error: no', '', 'refused'),
        ('works', 'error: no', '', 'fails'),
    ],
)
def test_a_failure_is_compared_with_the_float_network(
    expect, own, theirs, verdict, monkeypatch, tmp_path
):
    def in_float(part, folder):
        return Outcome(int(bool(theirs)), theirs, theirs)

    monkeypatch.setattr(
        'benchmarks.coverage.parts.trial.fail_in_float', in_float
    )
    status = 2 if own.startswith('error') else 1
    outcome = Outcome(status, own, own)
    part = Part('HOOKS/x.Y', expect=expect)
    assert judge(part, outcome, tmp_path)[0] == verdict


def test_what_is_printed_left_and_checked_must_hold(tmp_path):
    def tried(**how):
        return try_part(
            Part('x/y', commands=['echo said'], **how), '', tmp_path
        )

    assert tried(says='said').expected
    assert tried(says='silent').reason == (
        "nothing that is printed matches 'silent'"
    )
    assert tried(leaves='*.pth').reason == 'no file *.pth'
    row = tried(check=lambda folder: f'{folder.name} is odd')
    assert (row.verdict, row.reason) == ('fails', 'x-y is odd')
    row = tried(expect='refused')
    assert (row.verdict, row.expected) == ('works', False)


def test_a_real_row_and_one_that_fails(tmp_path, capsys, monkeypatch):
    """A constructor that must spare the scales of quantizers."""
    out = tmp_path / 'new/parts'
    name = 'OPTIM_WRAPPER_CONSTRUCTORS/mmengine.DefaultOptimWrapperConstructor'
    assert main([name, '--out', str(out)]) == 0
    text = out.with_suffix('.md').read_text()
    assert text in capsys.readouterr().out
    assert '1 rows: 1 works; 0 unexpected.' in text
    lines = out.with_suffix('.jsonl')
    (row,) = map(json.loads, lines.read_text().splitlines())
    assert (row['part'], row['verdict']) == (name, 'works')
    bad = Part('HOOKS/mmengine.EMAHook', commands=['echo no >&2; exit 1'])
    known = [part for part in plans.known_parts() if part.name == name]
    monkeypatch.setattr(plans, 'known_parts', lambda: [*known, bad])
    row['seconds'] = 7.0  # is not tried again
    lines.write_text(json.dumps(row) + '\n')
    words = [name, bad.name, '--resume', '--out', str(out)]
    assert main(words) == 1
    good, failed = map(json.loads, lines.read_text().splitlines())
    assert good['seconds'] == 7.0
    # the float network does not run either: it is the same command
    assert (failed['verdict'], failed['reason']) == ('mmpretrain', 'no')


@pytest.mark.parametrize(
    'arguments, line',
    [
        (['no/such*'], "got 'no/such*'"),
        (['--nix'], 'unrecognized arguments: --nix'),
    ],
)
def test_bad_options_are_one_line(arguments, line, capsys):
    assert main(arguments) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith('error: ') and line in error
