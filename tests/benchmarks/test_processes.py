import pytest

from benchmarks.processes import last_words


@pytest.mark.parametrize(
    'text, words',
    [
        ('', 'nothing'),
        ('a\nb\n\n', 'b'),
        ('why\nerror: rank 1 died; the job was stopped\n', 'why'),
        ('error: why\nTraceback\nRuntimeError: 2\n', 'error: why'),
        ('x' * 500, 'x' * 400),
    ],
)
def test_last_words(tmp_path, text, words):
    log = tmp_path / 'log'
    log.write_text(text)
    assert last_words(log, 'nothing') == words
