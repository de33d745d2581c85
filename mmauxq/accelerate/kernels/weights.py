"""The weights of a whole network, quantized in one launch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmauxq.quantizers.functional import MIN_SCALE

from .dispatch import is_dense, keep, on_device, runs_triton

# the best of a sweep on one NVIDIA H200 (0.113 ms; 0.168 ms at 1024, 4)
BLOCK, WARPS = 256, 2
ALIGNMENT = 64
"""Each weight begins at a multiple of so many elements, which the products
need for aligned loads."""


@dataclass
class WeightRange:
    """How one weight is quantized.

    Args:
        qmin: Lowest code, at most 0.
        qmax: Highest code, above ``qmin``.
        grad_scale: Factor on the gradient of the step.
    """

    qmin: int
    qmax: int
    grad_scale: float


def can_group(weight: Tensor, step: Tensor) -> bool:
    """Whether :class:`GroupedQuantizer` takes a weight and its step.

    Both must be float32 and on a device that Triton reads, the weights of an
    output channel (axis 0) contiguous, with a single step or one for each
    channel.
    """
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

    Args:
        ranges: For each weight, how it is quantized.
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
        """The quantized weights.

        Args:
            weights: Of any shapes, output channels first; see
                :func:`can_group`.
            steps: One for each weight, (1,) or (output channels,).
            dtype: Dtype of the results; float32, bfloat16 or float16, to
                which autocast would round them before a product.

        Returns:
            One for each weight, in its shape and strides.
        """
        self._prepare(weights, steps)
        return list(
            _QuantizeGroup.apply(self, dtype, *weights, *steps)  # type: ignore[no-untyped-call]
        )

    def _prepare(
        self, weights: Sequence[Tensor], steps: Sequence[Tensor]
    ) -> None:
        """Build the tables of addresses, unless no tensor has moved."""
        key = tuple(t.data_ptr() for t in (*weights, *steps))
        if key == self._key:
            return
        device = weights[0].device
        columns: dict[str, list[Tensor]] = {}
        firsts, counts, self.places = [], [], []
        start = row = 0
        for i, (w, s, r) in enumerate(
            zip(weights, steps, self.ranges, strict=True)
        ):
            rows = torch.arange(w.shape[0])
            length = w[0].numel()
            entries = dict(
                weight=w.data_ptr() + rows * length * w.element_size(),
                step=s.data_ptr()
                + (rows * s.element_size() if s.numel() > 1 else rows * 0),
                out=start + rows * length,
                length=rows * 0 + length,
                tensor=rows * 0 + i,
                inside=rows * length,
                qmin=rows * 0.0 + r.qmin,
                qmax=rows * 0.0 + r.qmax,
                scale=rows * 0.0 + r.grad_scale,
            )
            for name, column in entries.items():
                columns.setdefault(name, []).append(column)
            each = len(rows) // s.numel()
            firsts.append(row + torch.arange(s.numel()) * each)
            counts.append(torch.full((s.numel(),), each))
            self.places.append(start)
            start += -(-w.numel() // ALIGNMENT) * ALIGNMENT
            row += len(rows)
        self.size, self.rows = start, row
        self.table = {n: torch.cat(c).to(device) for n, c in columns.items()}
        self.firsts = torch.cat(firsts).to(device)
        self.counts = torch.cat(counts).to(device)
        self.one_row_each = len(self.counts) == row
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
        table = self.table
        with on_device(flat):
            forward_kernel[(self.rows,)](
                table['weight'],
                table['step'],
                table['out'],
                table['length'],
                table['qmin'],
                table['qmax'],
                flat,
                MIN_SCALE,
                BLOCK=BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
        return flat

    def run_backward(
        self, grads: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the weights, (size,), and of all steps, flat."""
        from .weights_triton import backward_kernel, sum_kernel

        device = weights[0].device
        addresses = torch.tensor(
            [g.data_ptr() for g in grads], pin_memory=device.type == 'cuda'
        )
        # a CUDA graph reads them again at each replay
        keep(addresses, *self.table.values(), self.firsts, self.counts)
        addresses = addresses.to(device, non_blocking=True)
        grad_weights = torch.empty(
            self.size, dtype=torch.float32, device=device
        )
        partial = torch.empty(self.rows, dtype=torch.float32, device=device)
        table = self.table
        with on_device(partial):
            backward_kernel[(self.rows,)](
                addresses,
                table['tensor'],
                table['inside'],
                table['weight'],
                table['step'],
                table['out'],
                table['length'],
                table['qmin'],
                table['qmax'],
                table['scale'],
                grad_weights,
                partial,
                MIN_SCALE,
                TYPE=_triton_type(grads[0].dtype),
                BLOCK=BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
            if self.one_row_each:
                return grad_weights, partial
            grad_steps = torch.empty(
                len(self.counts), dtype=torch.float32, device=device
            )
            sum_kernel[(len(self.counts),)](
                partial, self.firsts, self.counts, grad_steps, BLOCK=BLOCK
            )
        return grad_weights, grad_steps


class _QuantizeGroup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, group: GroupedQuantizer, dtype: torch.dtype, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        weights = tensors[: len(tensors) // 2]
        ctx.save_for_backward(*tensors)
        ctx.group, ctx.dtype = group, dtype
        flat = group.run_forward(weights, dtype)
        return tuple(group.views(flat, weights))

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        tensors, group = ctx.saved_tensors, ctx.group
        half = len(tensors) // 2
        weights, steps = tensors[:half], tensors[half:]
        # the addresses in the tables are those of the forward pass
        group._prepare(weights, steps)
        whole = [
            _like(grad, weight, ctx.dtype)
            for grad, weight in zip(grads, weights, strict=True)
        ]
        flat, grad_steps = group.run_backward(whole, weights)
        parts = grad_steps.split([s.numel() for s in steps])
        found = [
            *group.views(flat, weights),
            *(
                part.view(s.shape)
                for part, s in zip(parts, steps, strict=True)
            ),
        ]
        # no gradient, rather than zeros, for a layer that did not run
        used = [grad is not None for grad in grads] * 2
        return (
            None,
            None,
            *(g if u else None for g, u in zip(found, used, strict=True)),
        )


def _like(grad: Tensor | None, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient in the layout of ``weight``; zeros if there is none."""
    if grad is None:
        return torch.zeros_like(weight, dtype=dtype)
    if grad.stride() == weight.stride() and grad.dtype == dtype:
        return grad
    return torch.empty_like(weight, dtype=dtype).copy_(grad)


def _triton_type(dtype: torch.dtype):
    import triton.language as tl

    return {
        torch.float32: tl.float32,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
    }[dtype]
