"""The checkpoint that holds F alone."""

import io
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from mmauxq.checkpoint_file import read_checkpoint
from mmauxq.errors import UsageError
from mmauxq.files import write_atomically
from mmauxq.network.checkpoint import is_joint, meta_of, normalise
from mmauxq.version import __version__


def slim_checkpoint(
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    architecture: nn.Module | None = None,
) -> int:
    """Write F of a training checkpoint, without guidance or optimizer; the
    size of the file in bytes.

    Any ``torch.load(..., weights_only=True)`` reads the result; its keys are
    those of the quantized classifier (``backbone...``, ``head...``).

    Args:
        checkpoint: A training checkpoint of :class:`JointQAT`, or a slim one.
        out: File to write; complete or absent, never half-written.
        architecture: F, if its tensors are newer than those of the checkpoint.

    Raises:
        UsageError: If the checkpoint is not one of a quantized network.
    """
    source = read_checkpoint(checkpoint)
    state = normalise(source, str(checkpoint))
    # a JointQAT with 32 bits everywhere has no quantizer
    if not is_joint(source.get('state_dict', source)) and not any(
        '_quantizer.' in key for key in state
    ):
        raise UsageError(
            f'{checkpoint}: expected a quantized network, trained with '
            'mmauxq.JointQAT, got a float one'
        )
    if architecture is not None:
        state = architecture.state_dict()
    meta = meta_of(source)
    return write_slim(
        out,
        state,
        dict(
            epoch=meta.get('epoch', 0),
            iter=meta.get('iter', 0),
            cfg=str(meta.get('cfg', '')),
            classes=class_names(meta),
            # where MMPretrain's inferencers look for them
            dataset_meta=dict(classes=class_names(meta)),
            quantizer_bits=meta.get('quantizer_bits'),
            description=meta.get('description'),
        ),
    )


def write_slim(
    out: str | os.PathLike, state: dict[str, Tensor], meta: dict
) -> int:
    """Write a state dict of F; the size of the file in bytes.

    Args:
        out: File to write; complete or absent, never half-written.
        state: Of F.
        meta: Plain values that describe it.
    """
    slim = dict(
        meta=dict(mmauxq_version=__version__, **meta),
        state_dict={key: value.cpu().clone() for key, value in state.items()},
    )
    content = io.BytesIO()
    torch.save(slim, content)
    write_atomically(out, content.getvalue())
    return Path(out).stat().st_size


def class_names(meta: dict) -> list[str]:
    """Names of the classes in the meta of a checkpoint, if it has them."""
    dataset = meta.get('dataset_meta')
    dataset = dataset if isinstance(dataset, dict) else {}
    names = meta.get('classes') or dataset.get('classes')
    return list(map(str, names)) if isinstance(names, (list, tuple)) else []
