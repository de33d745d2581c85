"""Bits, range, levels and cost of every layer."""

from dataclasses import asdict
from typing import Any

import torch

from mmauxq.analysis import layer_costs
from mmauxq.analysis.levels import LevelCount
from mmauxq.network.profile import count_parameters
from mmauxq.quantizers import Quantizer, named_quantizers

from ..network import Network


def layer_table(
    network: Network,
    image: torch.Tensor,
    audit: list[LevelCount],
    kernels: dict[str, str],
) -> dict[str, Any]:
    """Layers in the order in which they run, and their sums.

    Args:
        network: What is exported.
        image: (1, C, H, W).
        audit: Levels of each quantizer.
        kernels: Quantized layer -> operator that runs it.
    """
    architecture = network.architecture
    levels = {count.name: count.levels for count in audit}
    quantizers = dict(named_quantizers(architecture))
    rows = []
    for cost in layer_costs(architecture, image):
        row = dict(
            **asdict(cost),
            bit_operations=cost.bit_operations,
            operator=kernels.get(cost.name, 'float'),
        )
        for role in ('weight', 'input'):
            name = f'{cost.name}.{role}_quantizer'
            if name in quantizers:
                row[f'{role}_range'] = _range(quantizers[name])
                row[f'{role}_levels'] = levels.get(name)
        rows.append(row)
    return dict(
        image_shape=list(image.shape[1:]),
        layers=rows,
        parameters=count_parameters(architecture)
        - sum(p.numel() for q in quantizers.values() for p in q.parameters()),
        multiply_adds=sum(row['multiply_adds'] for row in rows),
        bit_operations=sum(row['bit_operations'] for row in rows),
        guidance_left=sum(
            'guidance' in name for name in architecture.state_dict()
        ),
    )


def _range(quantizer: Quantizer) -> list[float]:
    """Lowest and highest value, over all channels."""
    grid = quantizer.grid()
    offset = 0.0 if grid.offset is None else grid.offset
    return [
        float((grid.qmin * grid.scale + offset).min()),
        float((grid.qmax * grid.scale + offset).max()),
    ]
