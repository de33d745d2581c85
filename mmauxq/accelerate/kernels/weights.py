"""The weights of a whole network, quantized in one launch."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmauxq.quantizers.functional import MIN_SCALE

from .dispatch import is_dense, keep, runs_triton
from .tiles import laid_out_like, launch

# the best of a sweep on one NVIDIA H200 (0.113 ms; 0.168 ms at 1024, 4)
BLOCK, WARPS = 256, 2
ALIGNMENT = 64
"""Each weight begins at a multiple of so many elements, which the products
need for aligned loads."""


class WeightRange(NamedTuple):
    """Codes of one weight, and the factor on the gradient of its step."""

    qmin: int
    qmax: int
    grad_scale: float


def can_group(weight: Tensor, step: Tensor) -> bool:
    """Whether :class:`GroupedQuantizer` takes a weight and its step: float32,
    on a device that Triton reads, the weights of an output channel (axis 0)
    contiguous, with a single step or one for each channel."""
    if not weight.dim():
        return False
    channels = weight.shape[0]
    return (
        runs_triton(weight)
        and weight.dtype == step.dtype == torch.float32
        and weight.device == step.device
        and weight.numel() > 0
        and is_dense(weight)
        and (channels == 1 or weight.stride(0) == weight[0].numel())
        and step.is_contiguous()
        and step.numel() in (1, channels)
    )


class GroupedQuantizer:
    """:func:`~mmauxq.quantizers.functional.learned_step_quantize` of many
    weights in one launch.

    There is one launch forward and two backward for any number of weights.
    Values and gradients of the weights equal those of the op to the bit; the
    gradient of a step is summed in another order. A step below 1e-6 counts as
    1e-6.
    """

    def __init__(self, ranges: Sequence[WeightRange]) -> None:
        self.ranges = list(ranges)
        self._key: tuple | None = None

    def __call__(
        self,
        weights: Sequence[Tensor],
        steps: Sequence[Tensor],
        dtype: torch.dtype = torch.float32,
    ) -> list[Tensor]:
        """The quantized weights, each in its shape and strides.

        Args:
            weights: Of any shapes, output channels first; see
                :func:`can_group`.
            steps: One for each weight, (1,) or (output channels,).
            dtype: Of the results: float32, bfloat16 or float16, to which
                autocast would round them before a product.
        """
        self._prepare(weights, steps)
        apply: Any = _QuantizeGroup.apply
        return list(apply(self, dtype, *weights, *steps))

    def _prepare(
        self, weights: Sequence[Tensor], steps: Sequence[Tensor]
    ) -> None:
        """Build the tables of addresses, unless no tensor has moved."""
        key = tuple(t.data_ptr() for t in (*weights, *steps))
        if key == self._key:
            return
        device = weights[0].device
        columns: dict[str, list[Tensor]] = defaultdict(list)
        counts, self.places, start = [], [], 0
        each = zip(weights, steps, self.ranges, strict=True)
        for i, (w, s, r) in enumerate(each):
            rows, length = torch.arange(w.shape[0]), w[0].numel()
            inside = rows * length
            entries = dict(
                weight=w.data_ptr() + inside * w.element_size(),
                step=s.data_ptr()
                + rows * (s.element_size() if s.numel() > 1 else 0),
                out=start + inside,
                length=torch.full_like(rows, length),
                tensor=torch.full_like(rows, i),
                inside=inside,
                qmin=torch.full(rows.shape, float(r.qmin)),
                qmax=torch.full(rows.shape, float(r.qmax)),
                scale=torch.full(rows.shape, float(r.grad_scale)),
            )
            for name, column in entries.items():
                columns[name + '_ptr'].append(column)
            counts += [len(rows) // s.numel()] * s.numel()
            self.places.append(start)
            start += -(-w.numel() // ALIGNMENT) * ALIGNMENT
        self.size, self.rows = start, sum(counts)
        self.table = {n: torch.cat(c).to(device) for n, c in columns.items()}
        of_step = torch.tensor(counts)
        self.counts = of_step.to(device)
        self.firsts = (of_step.cumsum(0) - of_step).to(device)
        self._key = key

    def views(self, flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """Views of ``flat`` in the shapes and strides of ``like``."""
        return [
            flat.as_strided(w.shape, w.stride(), place)
            for w, place in zip(like, self.places, strict=True)
        ]

    def run_forward(
        self, weights: Sequence[Tensor], dtype: torch.dtype
    ) -> Tensor:
        """All quantized weights in one buffer, (size,)."""
        from .weights_triton import forward_kernel

        flat = torch.empty(self.size, dtype=dtype, device=weights[0].device)
        table = {
            name: column
            for name, column in self.table.items()
            if name in forward_kernel.arg_names
        }
        launch(
            forward_kernel, flat, self.rows, **table, y_ptr=flat,
            least=MIN_SCALE, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
        return flat

    def run_backward(
        self, grads: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the weights, (size,), and of all steps, flat."""
        import triton.language as tl

        from .weights_triton import backward_kernel, sum_kernel

        device = weights[0].device
        addresses = torch.tensor(
            [g.data_ptr() for g in grads], pin_memory=device.type == 'cuda'
        )
        # a CUDA graph reads them again at each replay
        keep(addresses, *self.table.values(), self.firsts, self.counts)
        addresses = addresses.to(device, non_blocking=True)
        flat = torch.empty(self.size, dtype=torch.float32, device=device)
        partial = flat.new_empty(self.rows)
        launch(
            backward_kernel, flat, self.rows, addresses, **self.table,
            grad_weight_ptr=flat, partial_ptr=partial, least=MIN_SCALE,
            TYPE=getattr(tl, str(grads[0].dtype).removeprefix('torch.')),
            BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
        if len(self.counts) == self.rows:  # a step for each row
            return flat, partial
        grad_steps = flat.new_empty(len(self.counts))
        launch(
            sum_kernel, flat, len(self.counts), partial, self.firsts,
            self.counts, grad_steps, BLOCK=BLOCK, enable_fp_fusion=True,
        )  # fmt: skip
        return flat, grad_steps


class _QuantizeGroup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, group: GroupedQuantizer, dtype: torch.dtype, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        weights = tensors[: len(tensors) // 2]
        ctx.save_for_backward(*tensors)
        ctx.group, ctx.dtype = group, dtype
        return tuple(group.views(group.run_forward(weights, dtype), weights))

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        tensors, group = ctx.saved_tensors, ctx.group
        half = len(tensors) // 2
        weights, steps = tensors[:half], tensors[half:]
        # the addresses in the tables are those of the forward pass
        group._prepare(weights, steps)
        flat, grad_steps = group.run_backward(
            [
                torch.zeros_like(weight, dtype=ctx.dtype)
                if grad is None
                else laid_out_like(grad, weight, ctx.dtype)
                for grad, weight in zip(grads, weights, strict=True)
            ],
            weights,
        )
        parts = grad_steps.split([s.numel() for s in steps])
        found = [
            *group.views(flat, weights),
            *(p.view(s.shape) for p, s in zip(parts, steps, strict=True)),
        ]
        # no gradient, rather than zeros, for a layer that did not run
        used = [grad is not None for grad in grads] * 2
        given = (g if u else None for g, u in zip(found, used, strict=True))
        return None, None, *given
