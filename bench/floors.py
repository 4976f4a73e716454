"""What drawing codes from a gated PixelCNN cannot do without: multiply-adds, and bytes of weights and caches.

Counted is one evaluation of every part for every position, by what is there: taps outside the grid or before its first
frame are not, the input layer is a row of a table per tap, the condition's 1x1 serves both streams.
"""

from collections.abc import Iterable

from fastvid.nn import GatedPixelStack

Grid = tuple[int, int, int]  # T, H, W


def operations(stack: GatedPixelStack, grid: Grid) -> float:
    """Least operations for all codes of one sample; a multiply-add is two."""
    T, H, W = grid
    c = stack.config
    C, N = c.channels, T * H * W
    looked_up = live(stack.input_vertical.taps, grid) + live(stack.input_horizontal.taps, grid)
    total = N * (looked_up * C + 2.0 * (C * C + C * c.codes))  # and the head
    for layer in stack.layers:
        taps = live(layer.vertical.taps, grid) + live(layer.horizontal.taps, grid)
        total += 2.0 * N * (taps * C * 2 * C + (2 * C) ** 2 + c.condition_channels * 2 * C + C * C)
        if layer.attention is not None:
            total += 2.0 * N * (4 * C * C + 2 * C * mean_keys(grid, layer.attention.axial))
    return total


def live(taps: Iterable[tuple[int, int, int]], grid: Grid) -> float:
    """Taps of a convolution that look at something, averaged over the grid."""
    fits = ((max(0, n - abs(d)) / n for n, d in zip(grid, tap, strict=True)) for tap in taps)
    return sum(a * b * c for a, b, c in fits)


def mean_keys(grid: Grid, axial: bool) -> float:
    """Positions that an attending position sees, itself among them, averaged over the grid."""
    T, H, W = grid
    return (W + 1) / 2 + (H - 1) / 2 + (T - 1) / 2 if axial else (T * H * W + 1) / 2


def row_weights(stack: GatedPixelStack, t: int) -> int:
    """Weights that a row of frame t needs once: both streams' earlier and upper taps, condition, link."""
    c, count = stack.config, 0
    C = c.channels
    for layer in stack.layers:
        vertical = sum(t + dt >= 0 for dt, _, _ in layer.vertical.taps)
        earlier = sum(t + dt >= 0 > dt for dt, _, _ in layer.horizontal.taps)
        count += (vertical + earlier) * 2 * C * C + (2 * C) ** 2 + c.condition_channels * 2 * C
    return count


def pass_weights(stack: GatedPixelStack) -> int:
    """Weights that every evaluation of the pixel networks needs: present horizontal taps, 1x1s, attention, head."""
    c, count = stack.config, 0
    C = c.channels
    for layer in stack.layers:
        count += sum(dt == 0 for dt, _, _ in layer.horizontal.taps) * 2 * C * C + C * C
        count += 4 * C * C if layer.attention is not None else 0
    return count + C * C + C * c.codes


def cached_values(stack: GatedPixelStack, grid: Grid, position: int) -> int:
    """Keys and values that attention reads at one position of the grid, in raster order."""
    attending = [layer for layer in stack.layers if layer.attention is not None]
    return sum(2 * stack.config.channels * (position + 1) for _ in attending)
