"""Files that are complete or absent."""

import threading

from mmauxq.files import write_atomically


def test_two_writers_of_one_file(tmp_path):
    """As the ranks of a job: each leaves a complete file, none a part."""
    file = tmp_path / 'metrics.json'
    contents = [bytes([65 + i]) * 4096 for i in range(4)]
    failed = []

    def work(content):
        try:
            for _ in range(25):
                write_atomically(file, content)
                assert file.read_bytes() in contents
        except Exception as error:
            failed.append(error)

    writers = [
        threading.Thread(target=work, args=(content,)) for content in contents
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not failed
    assert [f.name for f in tmp_path.iterdir()] == ['metrics.json']
