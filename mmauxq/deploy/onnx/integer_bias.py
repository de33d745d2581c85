"""Integer biases that change no code.

An integer kernel adds its bias to the accumulator, as an integer number of
the accumulator's units. The bias of a folded batch norm is no such number, and
rounding it changes codes. But accumulators are integers, and between two of
them the line ``slope * n + bias`` may move freely: there is nearly always a
line with an integer bias that crosses the rounding thresholds between the same
accumulators. Small weight codes are multiplied by an integer factor first, as
far as int8 allows, which makes the unit as much finer.

This is exact for real numbers; what is left is the rounding of PyTorch's own
float32 sums. Outputs of more than :data:`MOST_LEVELS` levels have too many
thresholds for one line: there the bias is rounded, and a code changes if its
value is within half a unit of a threshold.
"""

from dataclasses import dataclass

import numpy as np

# Part of its value by which a scale must clear each threshold: float32
# products round by 2**-23 or so.
MARGIN = 1e-6
# A line with this margin is taken without looking for a better one.
WIDE = 1e-3
SEARCH = 64
MOST_LEVELS = 16
# Where there are no dot-product instructions, kernels add pairs of products
# in 16 bits.
PAIR_LIMIT = 2**15 - 1


@dataclass
class IntegerBias:
    """Weights and biases as an integer kernel takes them.

    Args:
        codes: Weight codes (out, ...), times a factor for each channel.
        scale: Their scale, (out,).
        bias: Integer biases, (out,).
        exact: Channels (out,) in which no code changes.
        reach: Most steps of the output by which a bias is off.
    """

    codes: np.ndarray
    scale: np.ndarray
    bias: np.ndarray
    exact: np.ndarray
    reach: float


def integer_bias(
    codes: np.ndarray,
    scale: np.ndarray,
    bias: np.ndarray,
    step: float,
    inputs: tuple[int, int, int],
    out_step: float,
    outputs: tuple[int, int],
) -> IntegerBias:
    """Weights and integer biases that give the same codes.

    Args:
        codes: Weight codes, (out, ...), with their ``scale``, (out,).
        bias: Exact biases, (out,).
        step: Step of the input.
        inputs: Lowest and highest code of the input, and its zero point.
        out_step: Step of the output.
        outputs: Lowest and highest code of the output.
    """
    small, large, zero = inputs
    low, high = outputs
    codes, scale = codes.copy(), scale.copy()
    integers, exact = np.zeros(len(codes)), np.zeros(len(codes), bool)
    reach = 0.0
    pair = PAIR_LIMIT // (2 * max(large + zero, 1))
    for c, row in enumerate(codes):
        most = max(int(np.abs(row).max()), 1)
        factor = max(min(127, pair) // most, 1)
        positive, negative = int(row[row > 0].sum()), int(row[row < 0].sum())
        sums = (
            positive * small + negative * large,
            positive * large + negative * small,
        )
        if small > 0 or large < 0:  # padding adds zeros
            sums = (min(sums[0], 0), max(sums[1], 0))
        line = None
        if high - low < MOST_LEVELS:
            exact_line = step * scale[c] / out_step, bias[c] / out_step
            line = fit_integer_line(*exact_line, low, high, sums, factor)
        if line is not None:
            alpha, integers[c], factor = line
            scale[c] = alpha * out_step / step
            exact[c] = True
        else:
            scale[c] /= factor
            unit = step * scale[c]
            integers[c] = np.rint(bias[c] / unit)
            reach = max(reach, abs(integers[c] * unit - bias[c]) / out_step)
        codes[c] *= factor
    return IntegerBias(codes, scale, integers, exact, float(reach))


def fit_integer_line(
    slope: float,
    bias: float,
    low: int,
    high: int,
    sums: tuple[int, int],
    factor: int,
) -> tuple[float, int, int] | None:
    """``(alpha, integer, spread)`` with the codes of ``slope * n + bias``.

    ``clip(round(alpha * (spread * n + integer)), low, high)`` equals
    ``clip(round(slope * n + bias), low, high)`` for all accumulators ``n``;
    with the widest margin of those tried; ``None`` if there is none.

    Args:
        slope: Positive.
        bias: The exact bias, in codes.
        sums: Least and greatest accumulator that can occur.
        factor: The greatest ``spread``.
    """
    t = np.arange(low, high) + 0.5
    last_under = np.ceil((t - bias) / slope) - 1
    left = np.clip(last_under, sums[0] - 1, sums[1])
    # alpha * (spread * n + integer) must lie under t at `left` and over it at
    # `left + 1`, as far as these can occur
    under = left >= sums[0]
    over = left + 1 <= sums[1]
    n = np.concatenate([left[under], left[over] + 1])
    t = np.concatenate([t[under], t[over]])
    side = np.repeat([1.0, -1.0], [under.sum(), over.sum()])
    widest, line = MARGIN, None
    for spread in range(factor, max(factor // 2, 1) - 1, -1):
        middle = round(bias / slope * spread)
        integers = middle + np.arange(-SEARCH, SEARCH + 1)[:, None]
        at = n * spread + integers
        # side * (alpha * at - t) < 0, so that t / at bounds alpha
        with np.errstate(divide='ignore', invalid='ignore'):
            bound = t / at
            above = np.where(side * at > 0, bound, np.inf)
            below = np.where(side * at < 0, bound, -np.inf)
            upper = above.min(1, initial=4 * slope / spread)
            lower = below.max(1, initial=slope / spread / 4)
            margin = (upper - lower) / (upper + lower)
        # an empty interval; an accumulator of 0, which no alpha moves
        margin[upper <= lower] = 0
        margin[((at == 0) & (side * t <= 0)).any(1)] = 0
        i = int(margin.argmax())
        if margin[i] > widest:
            widest = margin[i]
            alpha = float((upper[i] + lower[i]) / 2)
            line = alpha, int(integers[i, 0]), spread
            if widest > WIDE:
                break
    return line
