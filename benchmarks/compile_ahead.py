"""Compile launches of :mod:`.fusion_kernels` in several processes.

No GPU is needed; on a GPU, Triton then finds them in its cache.
"""

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

MOST_SHARED = 227 * 1024
"""Bytes of shared memory that a block may have on Hopper."""


class _Hopper:
    """Stands for Triton's driver, which needs a GPU."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget('cuda', 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _start() -> None:
    from triton.runtime.driver import driver

    driver.set_active(_Hopper())  # type: ignore[arg-type]


def _compile(spec: tuple) -> tuple[tuple, dict]:
    """What became of a launch: seconds, shared memory in bytes, registers of
    a thread and spilled bytes; whether it has the instructions of Hopper."""
    from . import fusion_kernels

    kernel, args, how = spec
    start = time.perf_counter()
    try:
        made = getattr(fusion_kernels, kernel).warmup(
            *args, grid=(1,), **dict(how)
        )
        ptx = made.asm['ptx']
        row = dict(
            seconds=round(time.perf_counter() - start, 1),
            shared=made.metadata.shared,
            wgmma='wgmma' in ptx,
            cp_async=ptx.count('cp.async.cg'),
            wide_stores=ptx.count('st.global.v4'),
            **_resources(made.asm['cubin']),
        )
    except Exception as error:
        return spec, dict(error=f'{type(error).__name__}: {error}'[:300])
    if row['shared'] > MOST_SHARED:
        row['error'] = f'{row["shared"]} bytes of shared memory'
    return spec, row


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack of a thread."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [knobs.nvidia.cuobjdump.path, '-res-usage', file.name],
            capture_output=True, text=True,
        )  # fmt: skip
    found = dict(re.findall(r'\b(REG|STACK):(\d+)', done.stdout))
    return {name.lower(): int(value) for name, value in found.items()}


class Compiler:
    """Compiles launches in the background, from the first to the last.

    Args:
        specs: Of launches; those that come first are wanted first.
        processes: How many compile; by default all processors but two.
    """

    def __init__(
        self, specs: Iterable[tuple], processes: int | None = None
    ) -> None:
        here = max(2, len(os.sched_getaffinity(0)) - 2)
        # neither a context of CUDA nor the interpreter goes with them
        before = os.environ.pop('TRITON_INTERPRET', None)
        self._pool = ProcessPoolExecutor(
            processes or here, get_context('spawn'), _start
        )
        specs = list(dict.fromkeys(specs))
        self._waiting = {self._pool.submit(_compile, s): s for s in specs}
        if before is not None:
            os.environ['TRITON_INTERPRET'] = before
        self._results = self.results()
        self._known: dict[tuple, dict] = {}

    def results(self) -> Iterator[tuple[tuple, dict]]:
        """Each spec with what became of it, as they are ready."""
        for future in as_completed(self._waiting):
            try:
                yield future.result()
            except Exception as error:  # left to the first launch
                yield self._waiting[future], dict(unknown=str(error))

    def errors(self, wanted: Iterable[tuple]) -> dict[tuple, str]:
        """Wait until all ``wanted`` are compiled; what is wrong with them."""
        wanted = set(wanted)
        while not wanted <= self._known.keys():
            found = next(self._results, None)
            if found is None:
                break
            self._known[found[0]] = found[1]
        return {
            spec: row['error']
            for spec, row in self._known.items()
            if spec in wanted and 'error' in row
        }

    def close(self) -> None:
        """Compile nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
