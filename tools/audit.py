"""Prove the level counts: tools/audit.py CONFIG CHECKPOINT [--onnx FILE]."""

import sys

import mmauxq  # noqa: F401  (makes mmauxq:: bases known to the config)
from mmauxq.export.audit_command import audit_command

if __name__ == '__main__':
    sys.exit(audit_command())
