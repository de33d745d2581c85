"""One folder with all that ships, and the proof that it computes F."""

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mmauxq.algorithms.dry_run import count_parameters
from mmauxq.engine.hooks import reestimate_batch_norm
from mmauxq.errors import UsageError
from mmauxq.evaluation import count_levels, deployed_bytes, layer_costs
from mmauxq.layers import restore
from mmauxq.quantizers import named_quantizers
from mmauxq.version import __version__

from . import runtime
from .agreement import compare
from .lower import Lowered
from .network import Network, first_images, guidance_cost
from .onnx_model import to_onnx
from .packed import load_packed, save_packed
from .report import as_markdown
from .slim import save_slim
from .trace import logits_of, trace

FILES = ('slim.pth', 'packed.safetensors', 'model.onnx', 'report.json',
         'report.md')  # fmt: skip


def check_folder(out: str | os.PathLike) -> Path:
    """``out``, if an export may be written there.

    Raises:
        UsageError: If it exists with other content than an export.
    """
    out = Path(out)
    if out.exists():
        if not out.is_dir():
            raise UsageError(f'--out {out} is a file; allowed is a folder')
        others = sorted(p.name for p in out.iterdir() if p.name not in FILES)
        if others:
            raise UsageError(
                f'--out {out} holds {others[0]}; allowed are a new folder, '
                'an empty one and an earlier export'
            )
    return out


@contextmanager
def _complete_or_absent(out: Path) -> Iterator[Path]:
    """A folder that takes the place of ``out`` when all went well."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f'.{out.name}.', dir=out.parent))
    except OSError as error:
        raise UsageError(
            f'--out {out} cannot be written: {error.strerror}'
        ) from error
    try:
        yield part
        os.chmod(part, 0o755)
        if out.exists():
            shutil.rmtree(out)
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def top1(architecture: Any, batches: list) -> float | None:
    """Part of the labels met; ``None`` without labels."""
    right = known = 0
    with torch.no_grad():
        for images, labels in batches:
            right += int(
                (logits_of(architecture, images).argmax(1) == labels).sum()
            )
            known += int((labels >= 0).sum())
    return right / known if known else None


def _to_onnx(
    network: Network,
    images: torch.Tensor,
    weights: str,
    residual: str,
    say: Callable[[str], None],
) -> tuple[Lowered, list[str]]:
    """The ONNX form asked for, or the next that the runtime takes."""
    notes = []
    traced = trace(network.architecture, images.shape[1:])
    for kind in [weights, 'int8'] if weights == 'typed' else [weights]:
        lowered = to_onnx(
            network.architecture, images, kind, residual,
            copy.deepcopy(traced),
        )  # fmt: skip
        try:
            runtime.session(lowered.model)
        except UsageError as error:
            if kind == 'int8':
                raise
            notes.append(f'{error}; fell back to the int8 container')
            say(f'warning: {notes[-1]}')
            continue
        break
    lowered.weights = kind
    return lowered, notes


def export(
    network: Network,
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    weights: str = 'typed',
    residual: str = 'float',
    images: int = 1000,
    batch_norm: int = 0,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Write slim.pth, packed.safetensors, model.onnx and the report.

    Args:
        network: Of :func:`mmauxq.export.network.load_network`.
        checkpoint: The file that it came from.
        out: Folder, complete or left as it was.
        weights: ``'typed'`` or ``'int8'``, see :func:`to_onnx`.
        residual: ``'float'`` or ``'int8'``, see :func:`to_onnx`.
        images: Validation images to compare on; 0 for a few generated ones.
        batch_norm: Training batches to re-estimate batch norms from first.
        say: Takes a line for each step.

    Returns:
        The report.

    Raises:
        UsageError: If something cannot be exported as asked.
    """
    if residual == 'int8' and weights != 'int8':
        raise UsageError(
            '--residual int8 is for integer kernels: it needs --weights int8'
        )
    out = check_folder(out)
    architecture = network.architecture
    batches = first_images(network, images)
    sample = torch.cat([b for b, _ in batches[:2]])[:250]
    with _complete_or_absent(out) as part:
        report: dict[str, Any] = dict(
            mmauxq_version=__version__, classes=network.classes()
        )
        if batch_norm:
            before = top1(architecture, batches)
            used = reestimate_batch_norm(
                architecture,
                (b for b, _ in network.images(10**9, 'train')[:batch_norm]),
            )
            after = top1(architecture, batches)
            report['batch_norm'] = dict(
                batches=used, top1_before=before, top1_after=after
            )
            say(f'batch norm: {used} batches, top-1 {before} -> {after}')
        sizes = _write_checkpoints(network, checkpoint, part, sample, say)
        audit = count_levels(architecture, sample)
        wide = [count.name for count in audit if not count.holds]
        if wide:
            raise UsageError(f'{wide[0]} has more levels than its bits allow')
        say(f'levels: all {len(audit)} quantized tensors hold their bits')
        lowered, notes = _to_onnx(network, sample, weights, residual, say)
        _describe(lowered, network)
        file = part / 'model.onnx'
        file.write_bytes(lowered.model.SerializeToString())
        sizes['model.onnx'] = file.stat().st_size
        operators = runtime.operators(lowered.model)
        say(
            f'model.onnx: opset {lowered.opset}, {sizes["model.onnx"]:,} '
            f'bytes; {_integer_products(operators)}'
        )
        # a quantized residual is another network; its codes differ by design
        agreement = compare(
            architecture, lowered.model, iter(batches),
            lowered.codes if residual == 'float' else None,
        )  # fmt: skip
        if residual == 'float' and not agreement.holds:
            raise UsageError(
                f'model.onnx differs from PyTorch: {agreement.unexplained} '
                'codes away from rounding ties, '
                f'{agreement.top1_differing_untouched} classes'
            )
        say(
            f'agreement: {agreement.top1_agreement:.2%} of '
            f'{agreement.images} images, logits within '
            f'{agreement.max_difference:.1e} (largest '
            f'{agreement.largest_logit:.1f}), {agreement.codes:,} codes '
            f'compared, {agreement.ties} at rounding ties'
        )
        report.update(
            _layers(network, sample[:1], audit),
            guidance=guidance_cost(network.cfg, sample[:1]),
            sizes=sizes,
            onnx=dict(
                weights=lowered.weights,
                residual=residual,
                opset=lowered.opset,
                containers=lowered.containers,
                batch_norms_folded=len(lowered.folded),
                batch_norms_kept=lowered.kept,
                exact_channels=lowered.exact_channels,
                rounded_channels=lowered.rounded_channels,
                float_outputs=lowered.float_outputs,
                operators=operators,
                notes=notes,
            ),
            agreement={'model.onnx': agreement.as_dict()},
            real_images=bool(images),
            runtime=_runtime(),
        )
        (part / 'report.json').write_text(json.dumps(report, indent=1) + '\n')
        (part / 'report.md').write_text(as_markdown(report))
    say(f'written: {out}')
    return report


def _integer_products(operators: dict[str, int]) -> str:
    found = {k: n for k, n in operators.items() if k in runtime.INTEGER_OPS}
    text = ', '.join(f'{n} {k}' for k, n in found.items())
    return f'integer kernels: {text or "none"}'


def _runtime() -> dict[str, Any]:
    import onnx
    import onnxruntime

    return dict(
        onnxruntime=onnxruntime.__version__,
        onnx=onnx.__version__,
        torch=torch.__version__,
        cpu=runtime.cpu_features(),
    )


@torch.no_grad()
def _write_checkpoints(
    network: Network,
    checkpoint: str | os.PathLike,
    part: Path,
    sample: torch.Tensor,
    say: Callable[[str], None],
) -> dict[str, int]:
    architecture = network.architecture
    sizes = dict(
        float=deployed_bytes(restore(copy.deepcopy(architecture))),
        sum_of_bits=deployed_bytes(architecture),
    )
    sizes['slim.pth'] = save_slim(checkpoint, part / 'slim.pth', architecture)
    say(f'slim.pth: {sizes["slim.pth"]:,} bytes')
    file = part / 'packed.safetensors'
    sizes['packed.safetensors'] = save_packed(
        architecture, file, _description(network)
    )
    again = copy.deepcopy(architecture)
    for parameter in again.parameters():
        parameter.zero_()
    load_packed(file, again)
    if not torch.equal(
        logits_of(again, sample), logits_of(architecture, sample)
    ):
        raise UsageError(
            'packed.safetensors does not give the same network back; a layer '
            'computes the weight that it quantizes (weight standardisation)'
        )
    say(
        f'packed.safetensors: {sizes["packed.safetensors"]:,} bytes '
        f'({sizes["packed.safetensors"] / sizes["sum_of_bits"] - 1:+.1%} of '
        'the sum of bits), loads back to the bit'
    )
    return sizes


def _description(network: Network) -> dict[str, str]:
    """What a program must know to use the network."""
    pre = network.algorithm.data_preprocessor

    def numbers(name: str) -> str:
        value = getattr(pre, name, None)
        return json.dumps(None if value is None else value.flatten().tolist())

    return {
        'mean': numbers('mean'),
        'std': numbers('std'),
        'channel_order': (
            'RGB' if getattr(pre, 'to_rgb', False)
            or getattr(pre, 'channel_conversion', False)
            else 'as read'
        ),
        'preprocessing': 'images = (pixels 0..255 - mean) / std, NCHW',
        'postprocessing': 'class = argmax(logits), probabilities = softmax',
        'classes': json.dumps(network.classes()),
    }  # fmt: skip


def _describe(lowered: Lowered, network: Network) -> None:
    bits = {
        name: dict(
            bits=q.bits,
            role=q.role,
            codes=lowered.codes[name][0] if name in lowered.codes else (
                f'{name}.codes'
            ),
        )
        for name, q in named_quantizers(network.architecture)
        if name in lowered.codes or name in lowered.containers
    }  # fmt: skip
    entries = {
        **_description(network),
        'mmauxq_version': __version__,
        'mmauxq_quantizers': json.dumps(bits),
    }
    for key, value in entries.items():
        lowered.model.metadata_props.add(key=key, value=value)


def _layers(network: Network, image: torch.Tensor, audit: list) -> dict:
    architecture = network.architecture
    levels = {count.name: count.levels for count in audit}
    quantizers = dict(named_quantizers(architecture))
    rows = []
    for cost in layer_costs(architecture, image):
        row = dict(
            name=cost.name,
            weight_bits=cost.weight_bits,
            activation_bits=cost.activation_bits,
            parameters=cost.parameters,
            multiply_adds=cost.multiply_adds,
            bit_operations=cost.bit_operations,
        )
        for role in ('weight', 'input'):
            name = f'{cost.name}.{role}_quantizer'
            if name in quantizers:
                grid = quantizers[name].grid()
                scale = grid.scale.max().item()
                offset = 0.0
                if grid.offset is not None:
                    offset = grid.offset.max().item()
                row[f'{role}_range'] = [
                    grid.qmin * scale + offset, grid.qmax * scale + offset
                ]  # fmt: skip
                row[f'{role}_levels'] = levels.get(name)
        rows.append(row)
    return dict(
        layers=rows,
        parameters=count_parameters(architecture)
        - sum(p.numel() for q in quantizers.values() for p in q.parameters()),
        multiply_adds=sum(row['multiply_adds'] for row in rows),
        bit_operations=sum(row['bit_operations'] for row in rows),
        guidance_left=sum(
            'guidance' in name for name in architecture.state_dict()
        ),
    )
