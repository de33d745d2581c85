"""Processes that are killed at an operation on files; nothing here is a test.

Python reports each operation to its audit hooks before it happens.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

OPERATIONS = {
    'open', 'os.link', 'os.mkdir', 'os.remove', 'os.rename', 'os.rmdir',
    'os.symlink', 'os.truncate',
}  # fmt: skip


def _listen(folder: Path, act: Callable[[str, tuple], None]) -> list[bool]:
    """Call ``act`` before each operation, while the result holds True.

    Opening counts in ``folder`` alone: imports open files, too.
    """
    armed = [True]

    def hook(event: str, args: tuple) -> None:
        if not armed[0] or event not in OPERATIONS:
            return
        if event == 'open' and not str(args[0]).startswith(str(folder)):
            return
        act(event, args)

    sys.addaudithook(hook)  # there is no way to remove one
    return armed


def killed_at(number: int, folder: Path, work: Callable[[], object]) -> bool:
    """Do ``work`` in a process that is killed before its operation of this
    number, from 0; whether it lived to see that.

    What would be renamed is cut in half before, as if the disk had not all.
    """
    pid = os.fork()
    if pid:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, -signal.SIGKILL)
        return status != 0
    try:
        seen = []

        def act(event: str, args: tuple) -> None:
            seen.append(event)
            if len(seen) > number:
                seen.clear()
                part = event == 'os.rename' and not os.path.islink(args[0])
                if part and str(args[0]).endswith('.part'):
                    os.truncate(args[0], os.path.getsize(args[0]) // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        _listen(folder, act)
        work()
        os._exit(0)
    finally:
        os._exit(99)


@contextmanager
def snapshots(folder: Path, into: Path) -> Iterator[list[Path]]:
    """Copies of ``folder``, one from before each operation: what a process
    that is killed there leaves."""
    taken: list[Path] = []

    def act(event: str, args: tuple) -> None:
        armed[0] = False
        place = into / str(len(taken))
        shutil.copytree(folder, place, symlinks=True)
        taken.append(place)
        armed[0] = True

    armed = _listen(folder, act)
    try:
        yield taken
    finally:
        armed[0] = False
