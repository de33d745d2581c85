"""Tables and figure of rows that are made up."""

from PIL import Image

from benchmarks import report

MACHINE = dict(device='a GPU', torch='2')
RUN = 'scaling/r18/w4a4/plain/2'


def step_row(what, form, ms, gib):
    return dict(
        MACHINE, arm=f'step/r50/{what}/{form}/256', network='r50', what=what,
        form=form, batch=256, ms=ms, low=ms - 1, high=ms + 1, repeats=9,
        peak_gib=gib,
    )  # fmt: skip


def run_row(gpus, rate, **more):
    return dict(
        arm=f'{RUN}/{gpus}', device='a GPU', torch='2', network='r18',
        what='w4a4', form='plain', batch=2, gpus=gpus, ms=2000 * gpus / rate,
        images_per_s=rate, data_ms=0.5, peak_gib=[1.25] * gpus, launch_s=12.3,
        end_s=4.6,
        **more,
    )  # fmt: skip


def test_ratios_are_to_the_float_network(tmp_path):
    rows = [
        step_row('float', 'compiled', 40.0, 10.0),
        step_row('float', 'eager', 50.0, 12.0),
        step_row('w4a4', 'compiled', 99.0, 9.0),
        step_row('w4a4', 'compiled', 44.0, 9.0),
        dict(arm='step/r50/aux/eager/256', error='out of memory'),
    ]
    text = report.markdown(rows)
    line = '| r50, batch 256 | w4a4 | compiled | 44 (43-45) | 1.10 | 0.88 '
    assert line + '| 9.00 | 0.75 |' in text
    assert ' 99 ' not in text  # measured again
    assert '- `step/r50/aux/eager/256` : out of memory' in text
    report.write(rows, tmp_path)
    assert (tmp_path / 'table.md').read_text() == text
    with Image.open(tmp_path / 'steps.png') as image:
        extremes = image.convert('L').getextrema()
    assert extremes[0] < 50 < 200 < extremes[1]  # something is drawn


def test_no_figure_without_steps(tmp_path):
    report.write([run_row(1, 1000.0)], tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ['table.md']


def test_a_row_of_before_the_end_was_timed_is_shown():
    row = run_row(1, 1000.0)
    assert '| 12 | 5 |' in report.markdown([row])
    del row['end_s']
    assert '| 12 |  |' in report.markdown([row])


def test_efficiency_is_that_against_one_process():
    split = dict(
        computing=90.0, all_reduce=4.0, all_reduce_total=20.0, sync_bn=0.0,
        sync_bn_total=0.0, idle=6.0,
    )  # fmt: skip
    files = dict(
        arm='loader/r18/2', network='r18', workers=2, cores=16, device='a GPU',
        images_per_s=700.0, per_worker=350.0, kilobytes=93.0, torch='2',
    )  # fmt: skip
    pillow = dict(
        files, arm='loader/r18/2/pillow', decoder='pillow',
        processor_ms=[2.5, 2.25, 3.0], of_opencv=[1.2, 1.1, 1.3],
    )  # fmt: skip
    rows = [
        dict(arm=f'{RUN}/8', error='rank 3 was killed by signal 9'),
        run_row(1, 1000.0),
        run_row(8, 7000.0),
        run_row(8, 7600.0, split=split),
        dict(arm=f'{RUN}/4', error='took more than 300 s'),
        files,
        pillow,
    ]
    text = report.markdown(rows)
    line = '| r18, batch 2 | w4a4 | plain | 8 | 2.11 | 7600 | 0.950 | '
    line += (
        f'{" ".join(["1.25"] * 8)} | 0.50 | 90 | 4 of 20 | 0 of 0 | 6 | 12 |'
    )
    assert line in text
    assert '7000' not in text  # measured again
    assert '| r18 |  | 2 of 16 | 700 | 350 |  |  | 93 | 7600 (8) |' in text
    line = '| r18 | pillow | 2 of 16 | 700 | 350 | 2.5 (2.25-3) | '
    assert line + '1.2 (1.1-1.3) | 93 | 7600 (8) |' in text
    assert 'took more than 300 s' in text
    assert 'signal 9' not in text  # it succeeded since
