"""Compile launches of :mod:`.fusion_kernels` in several processes.

No GPU is needed; on a GPU, Triton then finds them in its cache.
"""

import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
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
    except Exception as error:
        return spec, dict(error=f'{type(error).__name__}: {error}'[:300])
    ptx = made.asm['ptx']
    row = dict(
        seconds=round(time.perf_counter() - start, 1),
        shared=made.metadata.shared,
        wgmma='wgmma' in ptx,
        cp_async=ptx.count('cp.async.cg'),
        wide_stores=ptx.count('st.global.v4'),
        **_resources(made.asm['cubin']),
    )
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


def compile_ahead(
    specs: Iterable[tuple], processes: int | None = None
) -> Iterator[tuple[tuple, dict]]:
    """Compile, the first ones first; yields each with what became of it."""
    processes = processes or len(os.sched_getaffinity(0))
    # neither the context of CUDA nor the interpreter goes with them
    before = os.environ.pop('TRITON_INTERPRET', None)
    try:
        pool = multiprocessing.get_context('spawn').Pool(processes, _start)
    finally:
        if before is not None:
            os.environ['TRITON_INTERPRET'] = before
    with pool:
        yield from pool.imap_unordered(_compile, dict.fromkeys(specs))
