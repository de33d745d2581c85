"""The commands, called in this process."""

from functools import partial

from mmauxq.cli import run

train = partial(run, 'train')
evaluate = partial(run, 'test')
export_command = partial(run, 'export')
audit_command = partial(run, 'audit')
latency_command = partial(run, 'latency')
sensitivity_command = partial(run, 'sensitivity')
compare_command = partial(run, 'compare')
