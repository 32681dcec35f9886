"""Label maps straight from the logits of the head, without ever resizing the maps of all classes.

mmseg resizes the logits of every class to the size of the network's input, cuts off padding, resizes once more to the
size of the original image, and takes the argmax. :func:`label_map` gives the same labels, in every pixel:

1. *Rule out.* A bilinear value is a convex combination of its corners. So where the largest logit of a class around a
   tile of the label map lies below the smallest of another class, it wins no pixel of the tile. Two small pools
   over the logits find the classes that are left: a single one in most tiles, which then is the label.
2. *Evaluate.* In the other tiles the few classes left are resized in double precision, by one small matrix for each
   axis that does all the steps at once.
3. *Settle.* Where the two best are closer than the rounding of PyTorch's own arithmetic could move them, that
   arithmetic decides: the classes in question, seldom more than a few, go through the operations of mmseg.

Where ruling out leaves too much, all classes go through those operations, a few at a time.

All that is for a CPU. A GPU resizes all classes in less time than so many small operations take to start: there they
go through those operations, and where the maps would be too large, in groups of classes.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CELL = 4
"""Logits along a side of the cells that are pooled."""

TILE = 32
"""Pixels along a side of the tiles of the label map."""

GROUP = 4
"""Classes that PyTorch's operations resize together."""

FEW_CLASSES, SMALL_SIZE = 3, 128
"""Up to so many maps, or to this sum of height and width, ``F.interpolate`` uses kernels whose rounding depends on how
many maps there are and on the place of each among them (ATen's ``_use_vectorized_kernel_cond_2d``).

So few classes, which cost little, are all resized at once; of small maps all classes, where a pixel is in doubt."""

CHUNK = 2**20
"""Values in the tiles that are resized together: 8 MB, for the caches of a CPU."""

MOST = 2**27
"""Values of a step that an accelerator resizes together: 512 MB in single precision."""

CROWDED = 0.2
"""Share of the work of resizing all classes, in values made, above which the evaluation of tiles does not pay."""

ROUNDING = 10
"""Bound of what rounding does to a resized logit, in epsilons of the dtype times the largest logit around.

Up to four interpolations (two axes, two steps), each with at most four roundings of half an epsilon: weights,
products, sum. That makes eight; the rest is for the errors of errors.
"""


@dataclass(frozen=True)
class ResizeStep:
    """One step from the logits to the label map: cut off the borders, mirror, resize.

    Args:
        size: Height and width after the step.
        align_corners: As in ``F.interpolate``.
        padding: Pixels to cut off: left, right, top, bottom (the order of mmseg's ``padding_size``).
        flip: ``'horizontal'``, ``'vertical'`` or None.
    """

    size: tuple[int, int]
    align_corners: bool = False
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    flip: str | None = None

    def __post_init__(self) -> None:
        if self.flip not in (None, 'horizontal', 'vertical'):
            raise ValueError(f"flip is 'horizontal', 'vertical' or None; found {self.flip!r}")

    def __call__(self, maps: Tensor) -> Tensor:
        """The step with PyTorch's operations, as mmseg does it; maps (C, h, w) to (C, *size)."""
        left, right, top, bottom = self.padding
        maps = maps[:, top : maps.shape[1] - bottom, left : maps.shape[2] - right]
        if self.flip:
            maps = maps.flip(2 if self.flip == 'horizontal' else 1)
        return F.interpolate(maps[None], size=self.size, mode='bilinear', align_corners=self.align_corners)[0]

    def taps(self, axis: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Where the values along one axis come from, and with which weights.

        The weights are read off the operation itself, as it rounds them in this dtype: maps that are one at every
        third place tell three neighbours apart.

        Args:
            axis: 0 for rows, 1 for columns.
            length: Of the axis before the step.
            dtype: Of the maps.

        Returns:
            Indices and weights, (size, 3): out[i] = Σ_k weights[i, k] · in[indices[i, k]].
        """
        before, after = (self.padding[2:], self.padding[:2])[axis]
        sources = torch.arange(before, length - after)
        if self.flip == ('vertical', 'horizontal')[axis]:
            sources = sources.flip(0)
        n, size = len(sources), self.size[axis]
        thirds = (torch.arange(n) % 3 == torch.arange(3)[:, None]).to(dtype)
        resized = F.interpolate(
            thirds[None, :, None], size=(1, size), mode='bilinear', align_corners=self.align_corners
        )
        places = torch.arange(size, dtype=torch.double)
        if self.align_corners:
            places = places * ((n - 1) / max(size - 1, 1))
        else:
            places = (places + 0.5) * (n / size) - 0.5
        nearest = places.round().long().clamp(0, n - 1)[:, None]
        indices = nearest + torch.arange(-1, 2)
        weights = resized[0, :, 0].T.double().gather(1, indices % 3)
        weights[(indices < 0) | (indices >= n)] = 0
        return sources[torch.where(weights > 0, indices, nearest)], weights


@dataclass(frozen=True)
class TiledAxis:
    """One axis of the label map in tiles; the last one goes on past the end by repeating the last pixel.

    Args:
        cells: (tiles, k): the pooled cells that a tile depends on; repeated where it needs fewer than k.
        patches: (tiles, p): the logits that it depends on; as many for each tile.
        matrices: (tiles, TILE, p), double: from those logits to its pixels, through all the steps.
    """

    cells: Tensor
    patches: Tensor
    matrices: Tensor


@functools.lru_cache(maxsize=256)
def tile_axis(steps: tuple[ResizeStep, ...], axis: int, length: int, dtype: torch.dtype) -> TiledAxis:
    """The tiles along an axis whose ``length`` logits of this dtype go through ``steps``."""
    indices, weights = torch.arange(length)[:, None], torch.ones(length, 1, dtype=torch.double)
    for step in steps:
        sources, shares = step.taps(axis, len(indices), dtype)
        indices = indices[sources].flatten(1)
        weights = (weights[sources] * shares[..., None]).flatten(1)
    tiles = -(-len(indices) // TILE)
    pixels = torch.arange(tiles * TILE).clamp(max=len(indices) - 1)
    indices, weights = (taps[pixels].view(tiles, TILE, -1) for taps in (indices, weights))
    first, last = indices.amin((1, 2)), indices.amax((1, 2))
    patches = first[:, None] + torch.arange(int((last - first).max()) + 1)
    matrices = torch.zeros(tiles, TILE, patches.shape[1], dtype=torch.double)
    matrices.scatter_add_(2, indices - first[:, None, None], weights)
    first, last = first // CELL, last // CELL
    cells = torch.minimum(first[:, None] + torch.arange(int((last - first).max()) + 1), last[:, None])
    return TiledAxis(cells, patches.clamp(max=length - 1), matrices)


def resize_all(logits: Tensor, steps: tuple[ResizeStep, ...]) -> Tensor:
    """Logits (C, h, w) through all steps by PyTorch's operations, on contiguous maps as mmseg has them: (C, H, W)."""
    maps = logits.contiguous()
    for step in steps:
        maps = step(maps)
    return maps


def running_argmax(
    logits: Tensor, steps: tuple[ResizeStep, ...], classes: Tensor, pixels: tuple[Tensor, ...] = ()
) -> Tensor:
    """The first of ``classes``, in ascending order, with the largest resized logit; none of them NaN.

    The resized maps of all classes never exist together, but where they are few or small.

    Args:
        logits: (C, h, w).
        steps: To the label map.
        classes: (k,) indices.
        pixels: Rows and columns, to look at a few pixels only.

    Returns:
        Labels (H, W), or one for each of ``pixels``.
    """
    if _rounds_by_place(logits.shape, steps):
        labels = resize_all(logits, steps).argmax(0)
        return labels[pixels] if pixels else labels
    best = labels = None
    for group in classes.split(GROUP):
        # Always as many maps: for three, PyTorch rounds differently.
        filled = group[torch.arange(GROUP).clamp(max=len(group) - 1)]
        for index, values in zip(group, resize_all(logits[filled], steps)):
            values = values[pixels] if pixels else values
            if best is None:
                best, labels = values.clone(), index.expand_as(values).clone()
            else:
                labels.masked_fill_(values > best, index)
                torch.maximum(best, values, out=best)
    return labels


def _rounds_by_place(shape: torch.Size, steps: tuple[ResizeStep, ...]) -> bool:
    """Whether PyTorch's rounding of a map depends on its place among all; see :data:`FEW_CLASSES`."""
    size = shape[1:]
    for step in steps:
        left, right, top, bottom = step.padding
        # Maps of a single pixel lie in memory in channels-last order too, and are resized as such.
        if sum(step.size) <= SMALL_SIZE or (size[0] - top - bottom, size[1] - left - right) == (1, 1):
            return True
        size = step.size
    return False


def argmax_in_groups(logits: Tensor, steps: tuple[ResizeStep, ...]) -> Tensor:
    """The first class with the largest resized logit, a NaN being the largest, as ``argmax`` has it.

    On a device that resizes a map in the same way whatever maps are beside it.

    Args:
        logits: (C, h, w).
        steps: To the label map.

    Returns:
        Labels (H, W). The resized maps have :data:`MOST` values at once, or those of :data:`GROUP` classes.
    """
    values = len(logits) * max(math.prod(step.size) for step in steps)
    groups = max(1, min(-(-values // MOST), len(logits) // GROUP))
    best = labels = None
    first = 0
    for group in logits.tensor_split(groups):
        maps = resize_all(group, steps)
        winners = maps.argmax(0)
        if groups == 1:
            return winners
        highest = maps.gather(0, winners[None])[0]
        winners += first
        if best is None:
            best, labels = highest, winners
        else:
            higher = (highest > best) | (highest.isnan() & ~best.isnan())
            best, labels = torch.where(higher, highest, best), torch.where(higher, winners, labels)
        first += len(group)
    return labels


@torch.no_grad()
def label_map(logits: Tensor, steps: tuple[ResizeStep, ...]) -> Tensor:
    """``argmax`` over the classes of the resized logits, without resizing what cannot win.

    Args:
        logits: (C, h, w), C > 1, of any floating dtype and memory layout.
        steps: The last gives the size of the label map; without any, that is the size of the logits.

    Returns:
        (H, W), int64, where the logits are: in every pixel what ``resize_all(logits, steps).argmax(0)`` has there.
    """
    if not steps or len(logits) <= FEW_CLASSES:
        return resize_all(logits, steps).argmax(0)
    if logits.device.type != 'cpu':
        return argmax_in_groups(logits, steps)
    largest, smallest = _pool(logits, torch.amax), _pool(logits, torch.amin)
    limit = torch.finfo(logits.dtype).max / 2
    if not ((largest < limit) & (smallest > -limit)).all():
        # NaNs and infinities, or what rounding may take there: resized, they go ways of their own.
        return resize_all(logits, steps).argmax(0)
    rows, columns = (tile_axis(steps, axis, logits.shape[1 + axis], logits.dtype) for axis in (0, 1))
    left, margin = _rule_out(largest, smallest, rows, columns)
    # The tiles with the most classes come first, so that those with a k-th class stand in front.
    counts, order = left.sum(1).sort(descending=True, stable=True)
    counts = [count for count in counts.tolist() if count > 1]
    values = TILE**2 + rows.patches.shape[1] * columns.patches.shape[1]
    if sum(counts) * values > CROWDED * len(logits) * sum(step.size[0] * step.size[1] for step in steps):
        return running_argmax(logits.contiguous(), steps, torch.arange(len(logits)))

    tiles = left.byte().argmax(1)[:, None, None].repeat(1, TILE, TILE)
    close = torch.zeros(len(logits), dtype=torch.bool)
    doubts = []
    for chunk in _chunks(counts, CHUNK // values):
        places = order[chunk]
        pairs = _rank_by_rank(left[places].nonzero(), counts[chunk])
        resized = _resize_tiles(logits, pairs, places, rows, columns)
        tiles[places], doubtful = _compare(resized, pairs, counts[chunk], margin[places], close)
        if doubtful is not None:
            tile, y, x = doubtful.nonzero().T
            row, column = places[tile] // len(columns.cells), places[tile] % len(columns.cells)
            doubts.append(torch.stack([row * TILE + y, column * TILE + x]))
    height, width = steps[-1].size
    labels = tiles.view(len(rows.cells), -1, TILE, TILE).transpose(1, 2).reshape(len(rows.cells) * TILE, -1)
    labels = labels[:height, :width].contiguous()
    if doubts:
        y, x = torch.cat(doubts, 1)
        # The last tiles go on past the end.
        pixels = tuple(torch.stack([y, x])[:, (y < height) & (x < width)])
        labels[pixels] = running_argmax(logits, steps, close.nonzero()[:, 0], pixels)
    return labels


def _pool(logits: Tensor, reduce: Callable) -> Tensor:
    """Largest or smallest of every CELL × CELL logits, (C, h, w) to (ceil(h / CELL), ceil(w / CELL), C)."""
    # Reduced in the order in which they lie in memory, which is many times as fast.
    channels_last = logits.stride(0) == 1
    maps = logits.permute(1, 2, 0) if channels_last else logits
    for dim in (0, 1) if channels_last else (1, 2):
        length = maps.shape[dim]
        whole = length // CELL * CELL
        pooled = reduce(maps.narrow(dim, 0, whole).unflatten(dim, (-1, CELL)), dim + 1)
        if whole < length:
            rest = reduce(maps.narrow(dim, whole, length - whole), dim, keepdim=True)
            pooled = torch.cat([pooled, rest], dim)
        maps = pooled
    return maps if channels_last else maps.permute(1, 2, 0).contiguous()


def _pool_cells(pooled: Tensor, reduce: Callable, rows: TiledAxis, columns: TiledAxis) -> Tensor:
    """From cells to tiles: (cells, cells, C) to (tiles, C), row by row."""
    for dim, axis in enumerate((rows, columns)):
        parts = [pooled.index_select(dim, cells) for cells in axis.cells.T]
        pooled = functools.reduce(reduce, parts)
    return pooled.flatten(0, 1)


def _rule_out(largest: Tensor, smallest: Tensor, rows: TiledAxis, columns: TiledAxis) -> tuple[Tensor, Tensor]:
    """Which classes are left in which tile.

    Args:
        largest: Of each cell, (cells, cells, C).
        smallest: Likewise.
        rows: The tiles from top to bottom.
        columns: The tiles from left to right.

    Returns:
        (tiles, C) bool, row by row; and (tiles,) double, how close two resized logits can come to each other before
        PyTorch's rounding may exchange them.
    """
    unit = torch.finfo(largest.dtype)
    largest = _pool_cells(largest, torch.maximum, rows, columns).double()
    smallest = _pool_cells(smallest, torch.minimum, rows, columns).double()

    def rounding(values: Tensor) -> Tensor:
        return ROUNDING * (values.abs() * unit.eps + unit.tiny)

    sure = (smallest - rounding(smallest)).amax(1, keepdim=True)
    left = largest + rounding(largest) >= sure
    margin = torch.maximum(rounding(largest), rounding(smallest)).masked_fill(~left, 0).amax(1)
    return left, 2 * margin


def _chunks(counts: Sequence[int], most: int) -> Iterator[slice]:
    """Successive slices whose counts sum to at most ``most``, or of one count that is larger."""
    start = total = 0
    for index, count in enumerate(counts):
        if total and total + count > most:
            yield slice(start, index)
            start, total = index, 0
        total += count
    if total:
        yield slice(start, len(counts))


def _rank_by_rank(pairs: Tensor, counts: Sequence[int]) -> Tensor:
    """Pairs (P, 2) of tile and class, sorted by tile, to (2, P): the first class of every tile, then the second, ..."""
    counts = torch.tensor(counts)
    first = counts.cumsum(0) - counts
    rank = torch.arange(len(pairs)) - first[pairs[:, 0]]
    return pairs[rank.argsort(stable=True)].T


def _resize_tiles(logits: Tensor, pairs: Tensor, tiles: Tensor, rows: TiledAxis, columns: TiledAxis) -> Tensor:
    """The resized logits of some classes in some tiles.

    Args:
        logits: (C, h, w).
        pairs: (2, P): index into ``tiles``, and class; rank by rank.
        tiles: (n,) indices of tiles, row by row.
        rows: The tiles from top to bottom.
        columns: The tiles from left to right.

    Returns:
        (P, TILE, TILE), double.
    """
    index, classes = pairs
    row, column = (part[index] for part in (tiles // len(columns.cells), tiles % len(columns.cells)))
    # Addresses in memory: one index instead of three is ten times as fast.
    in_class, in_row, in_column = logits.stride()
    addresses = (classes * in_class)[:, None, None]
    addresses = addresses + (rows.patches * in_row)[row][:, :, None] + (columns.patches * in_column)[column][:, None]
    length = 1 + sum((n - 1) * step for n, step in zip(logits.shape, logits.stride()))
    memory = logits.as_strided((length,), (1,))
    patches = memory.index_select(0, addresses.flatten()).view_as(addresses)
    across = patches.double() @ columns.matrices.index_select(0, column).mT
    return rows.matrices.index_select(0, row) @ across


def _compare(
    resized: Tensor, pairs: Tensor, counts: Sequence[int], margin: Tensor, close: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The winners in some tiles, and where they are in doubt.

    Args:
        resized: (P, TILE, TILE).
        pairs: (2, P): index of the tile, and class; in ascending order for each tile.
        counts: Classes of each tile, in descending order.
        margin: (n,): below which a lead is in doubt.
        close: (C,) bool: set for the classes that may win where there is doubt.

    Returns:
        Labels (n, TILE, TILE), and which of them are in doubt, None for none.
    """
    index, classes = pairs
    margin = margin[:, None, None]
    ranks = [sum(count > rank for count in counts) for rank in range(counts[0])]
    values, labels = (part.split(ranks) for part in (resized, classes[:, None, None].expand_as(resized)))
    best, second, label = values[0].clone(), torch.full_like(values[0], -torch.inf), labels[0].clone()
    for value, other in zip(values[1:], labels[1:]):
        # The tiles that have so many classes are the first ones.
        lead, follow, winner = best[: len(value)], second[: len(value)], label[: len(value)]
        torch.maximum(follow, torch.minimum(value, lead), out=follow)
        winner.copy_(torch.where(value > lead, other, winner))
        torch.maximum(lead, value, out=lead)
    doubtful = best - second <= margin
    if not doubtful.any():
        return label, None
    among = doubtful.flatten(1).any(1)[index].nonzero()[:, 0]
    index, classes = index[among], classes[among]
    candidates = (resized[among] >= (best - margin)[index]) & doubtful[index]
    close.index_fill_(0, classes[candidates.flatten(1).any(1)], True)
    return label, doubtful
