"""Logits of every kind, steps to label maps, and what mmseg makes of them: the cases of the tests of label maps."""

import torch
import torch.nn.functional as F
from hypothesis import event
from hypothesis import strategies as st

from projects.recnext.recnext.models import label_map as module
from projects.recnext.recnext.models.label_map import ResizeStep

INTEGERS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
KINDS = ('noise', 'smooth', 'confident', 'flat', 'tied', 'quantised', 'adversarial', 'denormal', 'huge', 'mixed')
LAYOUTS = ('contiguous', 'channels last', 'of a batch', 'of a batch, channels last', 'window', 'expanded')
# The default; never too crowded for the tiles; always too crowded for them.
CROWDED = (module.CROWDED, 1e9, -1)


def stock_logits(logits, steps):
    """What mmseg's ``predict_by_feat`` and ``postprocess_result`` do, with their operations in their order."""
    maps = logits.contiguous()[None]
    for step in steps:
        left, right, top, bottom = step.padding
        height, width = maps.shape[2:]
        maps = maps[:, :, top : height - bottom, left : width - right]
        if step.flip is not None:
            maps = maps.flip(dims=({'horizontal': 3, 'vertical': 2}[step.flip],))
        maps = F.interpolate(maps, size=step.size, mode='bilinear', align_corners=step.align_corners)
    return maps.squeeze(0)


def stock(logits, steps):
    return stock_logits(logits, steps).argmax(dim=0)


def neighbours(values, seed):
    """Every third value or so moved by up to two units in the last place."""
    generator = torch.Generator().manual_seed(seed)
    bits = values.view(INTEGERS.get(values.dtype, torch.int16))
    moved = torch.randint(-2, 3, values.shape, generator=generator)
    here = (torch.rand(values.shape, generator=generator) < 0.3) & (values != 0)
    return (bits + (moved * here).to(bits.dtype)).view(values.dtype)


def make_logits(kind, shape, scale, dtype, seed):
    classes, height, width = shape
    generator = torch.Generator().manual_seed(seed)

    def noise(*size):
        return torch.randn(size, generator=generator, dtype=torch.double)

    def smooth(size):
        coarse = 10 * noise(1, classes, min(3, size[0]), min(3, size[1]))
        return F.interpolate(coarse, size=size, mode='bicubic')[0]

    def confident():
        winners = torch.randint(0, classes, (1, 1, 3, 3), generator=generator).double()
        winners = F.interpolate(winners, size=(height, width))[0, 0].long()
        return 10 * F.one_hot(winners, classes).permute(2, 0, 1) + 0.01 * noise(*shape)

    limits = torch.finfo(dtype)
    if kind == 'noise':
        values = scale * noise(*shape)
    elif kind == 'smooth':
        values = smooth((height, width))
    elif kind == 'confident':
        values = scale * confident()
    elif kind == 'flat':
        values = (scale * noise(classes, 1, 1)).expand(shape)
    elif kind == 'quantised':
        values = (4 * noise(*shape)).round() / 2
    elif kind == 'denormal':
        values = noise(*shape) * limits.tiny / 8
    elif kind == 'huge':
        # Further up, PyTorch's own rounding takes finite logits to infinity.
        values = noise(*shape).clamp(-3, 3) / 3 * (limits.max / 2)
    elif kind == 'mixed':
        values = torch.where(torch.rand(height, width, generator=generator) < 0.1, noise(*shape), scale * confident())
    else:
        values = scale * smooth((height, width))
    values = values.clamp(-limits.max / 2, limits.max / 2).to(dtype)
    if kind == 'tied':
        values = values[torch.randint(0, max(classes // 2, 1), (classes,), generator=generator)]
    elif kind == 'adversarial':
        values = values[torch.randint(0, max(classes // 2, 1), (classes,), generator=generator)]
        values = neighbours(values, seed)
    return values.contiguous()


def in_layout(values, layout, seed):
    """The logits in another layout in memory; 'expanded' repeats one class, row or column."""
    if layout == 'channels last':
        return values.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    if layout.startswith('of a batch'):
        batch = torch.stack([torch.full_like(values, torch.nan), values, torch.full_like(values, torch.inf)])
        return batch.to(memory_format=torch.channels_last if 'last' in layout else torch.contiguous_format)[1]
    if layout == 'window':
        return F.pad(values, (1, 2, 3, 1), value=torch.nan)[:, 3:-1, 1:-2]
    if layout == 'expanded':
        return values.narrow(seed % 3, 0, 1).expand_as(values)
    return values


def sizes(low, high):
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def cases(draw, classes=(2, 3, 4, 5, 19, 150), low=1, kinds=KINDS, dtypes=DTYPES, number_of_steps=(1, 2)):
    """Logits and steps; ``low`` is the least side of a map after a step."""
    count = draw(st.sampled_from(classes))
    longest = 40 if count < 19 else 24 if count < 150 else 12
    largest = 130 if count < 19 else 110 if count < 150 else 80
    height, width = draw(sizes(1, longest))
    arbitrary = st.one_of(sizes(low, largest), sizes(max(low, 66), max(largest, 80)))
    fourfold = (max(4 * height, low), max(4 * width, low))
    first = draw(st.one_of(st.just(fourfold), arbitrary))
    align_corners = draw(st.booleans())
    steps = [ResizeStep(first, align_corners)]
    if draw(st.sampled_from(number_of_steps)) == 2:
        padding = [0, 0, 0, 0]
        if draw(st.booleans()):
            for side, length in zip((0, 2), (first[1], first[0])):
                padding[side] = draw(st.integers(0, length - 1))
                padding[side + 1] = draw(st.integers(0, length - 1 - padding[side]))
        flip = draw(st.sampled_from([None, 'horizontal', 'vertical']))
        steps.append(ResizeStep(draw(arbitrary), align_corners, tuple(padding), flip))
    kind = draw(st.sampled_from(kinds))
    dtype = draw(st.sampled_from(dtypes))
    layout = draw(st.sampled_from(LAYOUTS))
    scale = draw(st.sampled_from([1e-3, 1.0, 10.0, 1e4]))
    seed = draw(st.integers(0, 2**20))
    event(kind)
    return kind, (count, height, width), scale, dtype, layout, seed, tuple(steps)


def logits_of(kind, shape, scale, dtype, layout, seed):
    return in_layout(make_logits(kind, shape, scale, dtype, seed), layout, seed)


def assert_same(labels, expected, what=''):
    assert labels.dtype == torch.int64 and labels.shape == expected.shape
    assert torch.equal(labels, expected), f'{what}: {(labels != expected).sum()} of {labels.numel()} pixels differ'
