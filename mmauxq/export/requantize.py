"""Integer biases that change no code.

An integer kernel adds its bias to the accumulator, in whole units. The bias of
a folded batch norm is no whole number of them, and at 2 bits the unit is so
large that rounding it turns 1 in 1,000 codes, layer after layer. But only
finitely many accumulators exist, and between two of them the line
``scale * n + bias`` may move freely: there is nearly always a line with a
whole bias that crosses the rounding thresholds between the same accumulators.
"""

import numpy as np

# Part of its value by which a scale must clear each threshold: float32
# products round by 2**-23 or so.
MARGIN = 1e-6
SEARCH = 64


def exact_line(
    slope: float,
    bias: float,
    low: int,
    high: int,
    reach: tuple[int, int],
    factor: int,
) -> tuple[float, int, int] | None:
    """``(alpha, whole, factor)`` with the codes of ``slope * n + bias``.

    ``clip(round(alpha * (factor * n + whole)), low, high)`` equals
    ``clip(round(slope * n + bias), low, high)`` for all whole ``n`` in
    ``reach``.

    Args:
        slope: Positive.
        bias: The exact bias, in codes.
        low: Lowest code.
        high: Highest code, above ``low``.
        reach: Least and greatest accumulator that can occur.
        factor: Greatest whole number to spread accumulators by.

    Returns:
        The line with the widest margin that was found, or ``None``.
    """
    thresholds = np.arange(low, high) + 0.5
    below = np.ceil((thresholds - bias) / slope) - 1  # last n under it
    below = np.clip(below, reach[0] - 1, reach[1])
    left, right = below, below + 1
    is_left, is_right = left >= reach[0], right <= reach[1]
    if not (is_left.any() or is_right.any()):
        return None
    best, found = MARGIN, None
    for spread in range(factor, max(factor // 2, 1) - 1, -1):
        middle = round(bias / slope * spread)
        whole = middle + np.arange(-SEARCH, SEARCH + 1)[:, None]
        # thresholds t: alpha * at_left < t < alpha * at_right
        at_left, at_right = left * spread + whole, right * spread + whole
        lower = np.zeros(len(whole))
        upper = np.full(len(whole), np.inf)
        good = np.ones(len(whole), bool)
        for at, used, under in (
            (at_left, is_left, True),
            (at_right, is_right, False),
        ):
            at, t = at[:, used], thresholds[used]
            with np.errstate(divide='ignore', invalid='ignore'):
                bound = t / at
            is_upper = (at > 0) == under
            is_upper &= at != 0
            is_lower = ((at < 0) == under) & (at != 0)
            upper = np.minimum(
                upper,
                np.where(is_upper, bound, np.inf).min(1, initial=np.inf),
            )
            lower = np.maximum(
                lower,
                np.where(is_lower, bound, -np.inf).max(1, initial=-np.inf),
            )
            # where the accumulator is 0, the threshold's sign decides
            wrong = (at == 0) & ((t <= 0) if under else (t >= 0))
            good &= ~wrong.any(1)
        upper = np.minimum(upper, 4 * slope / spread)
        lower = np.maximum(lower, slope / spread / 4)
        margin = np.where(good, (upper - lower) / (upper + lower), -1)
        at = int(margin.argmax())
        if margin[at] > best:
            best = margin[at]
            found = (
                float((upper[at] + lower[at]) / 2),
                int(whole[at, 0]),
                spread,
            )
            if best > 1e-3:
                break
    return found
