"""Programs that need a fresh process, without the cost of one for each."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.conftest import process_environment

FORKS = """
import os
import sys
import traceback

for name, program in PROGRAMS.items():
    os.mkdir(name)
    child = os.fork()
    if not child:
        os.chdir(name)
        for number, stream in ((1, 'stdout'), (2, 'stderr')):
            os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), number)
        status = 1
        try:
            exec(program, globals())
            status = 0
        except SystemExit as leaves:
            status = leaves.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with open(f'{name}/status', 'w') as file:
        file.write(str(status))
"""


def in_children(
    folder: Path, first: str, programs: Mapping[str, str]
) -> dict[str, subprocess.CompletedProcess]:
    """Run programs in forks of one fresh process.

    Importing MMPretrain takes longer than most programs; here it is done
    once. What a program imports or changes, the others do not see.

    Args:
        folder: Each program runs in a folder of its name in this one.
        first: A program whose names the others have: what all import.
        programs: Name -> a program.

    Returns:
        Name -> what it wrote and how it ended.
    """
    file = folder / 'programs.py'
    file.write_text(f'{first}\nPROGRAMS = {dict(programs)!r}\n{FORKS}')
    done = subprocess.run(
        [sys.executable, str(file)],
        cwd=folder, env=process_environment(), capture_output=True,
        text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        name: subprocess.CompletedProcess(
            name,
            int((folder / name / 'status').read_text()),
            (folder / name / 'stdout').read_text(),
            (folder / name / 'stderr').read_text(),
        )
        for name in programs
    }
