"""Label maps against mmseg's own way, two resizes of all classes and their argmax: equal in every pixel, whatever the
logits, sizes, dtypes and layouts; and that it neither resizes nor holds what it claims to spare."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers.devices import Device, upsample
from helpers.logits import (
    CROWDED,
    DTYPES,
    assert_same,
    cases,
    in_layout,
    logits_of,
    make_logits,
    sizes,
    stock,
    stock_logits,
)
from helpers.networks import Largest, threads
from helpers.strength import examples
from hypothesis import given
from hypothesis import strategies as st

from projects.recnext.recnext.models import label_map as module
from projects.recnext.recnext.models.label_map import ResizeStep, label_map

pytestmark = pytest.mark.usefixtures('one_thread')


@examples(1000)
@given(case=cases())
def test_labels_are_those_of_mmseg(case):
    *how, steps = case
    logits = logits_of(*how)
    before = logits.clone()
    expected = stock(logits, steps)
    for crowded in CROWDED:
        with mock.patch.object(module, 'CROWDED', crowded):
            assert_same(label_map(logits, steps), expected, f'CROWDED={crowded}')
    assert torch.equal(logits, before)


@pytest.mark.parametrize('crowded', CROWDED)
def test_labels_of_a_real_size(crowded, monkeypatch):
    monkeypatch.setattr(module, 'CROWDED', crowded)
    steps = (ResizeStep((384, 512)), ResizeStep((500, 667), padding=(0, 3, 0, 5), flip='horizontal'))
    for kind in ('smooth', 'mixed', 'tied'):
        logits = make_logits(kind, (30, 96, 128), 1, torch.float32, 0)
        assert_same(label_map(logits, steps), stock(logits, steps), kind)


def test_large_ratios():
    for shape, ends in (((5, 1, 3), ((700, 2), (3, 900))), ((5, 300, 200), ((3, 140), (150, 1)))):
        steps = tuple(ResizeStep(size) for size in ends)
        for kind in ('noise', 'smooth', 'tied'):
            logits = make_logits(kind, shape, 1, torch.float32, 1)
            assert_same(label_map(logits, steps), stock(logits, steps), kind)


@pytest.mark.parametrize(
    ('shape', 'steps'),
    [
        ((19, 1, 1), (ResizeStep((19, 110)),)),
        ((19, 16, 16), (ResizeStep((64, 66)), ResizeStep((19, 110), padding=(0, 65, 0, 63), flip='vertical'))),
    ],
)
def test_equal_maps_of_one_pixel(shape, steps):
    for seed in range(10):
        value = torch.randn((), generator=torch.Generator().manual_seed(seed))
        logits = value.expand(shape)
        assert_same(label_map(logits, steps), stock(logits, steps))


@pytest.mark.every(2)
@pytest.mark.parametrize('dtype', DTYPES)
def test_logits_that_rounding_takes_to_infinity(dtype):
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.full((5, 9, 11), torch.finfo(dtype).max, dtype=dtype)
        logits[torch.rand(logits.shape, generator=generator) < 0.3] *= -1
        height, width, *size = torch.randint(1, 170, (4,), generator=generator).tolist()
        steps = (ResizeStep((height, width)), ResizeStep(tuple(size)))
        for crowded in CROWDED:
            with mock.patch.object(module, 'CROWDED', crowded):
                assert_same(label_map(logits, steps), stock(logits, steps), f'CROWDED={crowded}')


# --- Threads ---

MANY = dict(classes=(4, 5, 9, 19), low=66)


@examples(200)
@given(case=cases(**MANY), crowded=st.sampled_from(CROWDED), number=st.sampled_from([2, 2, 2, 3]))
def test_more_threads_give_the_labels_of_one(case, crowded, number):
    """Three are special: of three maps PyTorch rounds differently when there are several threads."""
    *how, steps = case
    logits = logits_of(*how)
    expected = stock(logits, steps)
    with threads(number), mock.patch.object(module, 'CROWDED', crowded):
        assert_same(label_map(logits, steps), expected)


@examples(100)
@given(case=st.one_of(cases(classes=(2, 3)), cases(classes=(4, 5, 19))))
def test_of_few_or_small_maps_the_labels_are_those_of_as_many_threads(case):
    """PyTorch itself chooses among kernels by the number of threads, and so does label_map."""
    *how, steps = case
    logits = logits_of(*how)
    if len(logits) > module.FEW_CLASSES and all(sum(step.size) > module.SMALL_SIZE for step in steps):
        steps = (*steps, ResizeStep((20, 30)))
    with threads(2):
        expected = stock(logits, steps)
        for crowded in CROWDED:
            with mock.patch.object(module, 'CROWDED', crowded):
                assert_same(label_map(logits, steps), expected, f'CROWDED={crowded}')


# --- NaN and infinity ---


@examples(300)
@given(
    case=cases(classes=(2, 3, 4, 19), kinds=('noise', 'flat', 'confident', 'tied')),
    value=st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    places=st.integers(1, 3),
    whole=st.sampled_from(['pixel', 'class', 'place', 'everything']),
)
def test_nan_and_infinity_go_the_way_they_go_in_mmseg(case, value, places, whole):
    kind, shape, scale, dtype, layout, seed, steps = case
    logits = make_logits(kind, shape, scale, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(places):
        label, row, column = (int(torch.randint(0, length, (), generator=generator)) for length in shape)
        if whole == 'pixel':
            logits[label, row, column] = value
        elif whole == 'class':
            logits[label] = value
        elif whole == 'place':
            logits[:, row, column] = value
        else:
            logits[:] = value
    logits = in_layout(logits, layout, seed)
    for crowded in CROWDED:
        with mock.patch.object(module, 'CROWDED', crowded):
            assert_same(label_map(logits, steps), stock(logits, steps), f'CROWDED={crowded}')


# --- Weights ---


@st.composite
def single_steps(draw):
    shape = draw(sizes(1, 60))
    padding = [0, 0, 0, 0]
    if draw(st.booleans()):
        for side, length in zip((0, 2), (shape[1], shape[0])):
            padding[side] = draw(st.integers(0, length - 1))
            padding[side + 1] = draw(st.integers(0, length - 1 - padding[side]))
    flip = draw(st.sampled_from([None, 'horizontal', 'vertical']))
    return shape, ResizeStep(draw(sizes(1, 200)), draw(st.booleans()), tuple(padding), flip)


def by_taps(values, step):
    """The step by its indices and weights alone, in double precision."""
    for axis, dim in ((0, 1), (1, 2)):
        indices, weights = step.taps(axis, values.shape[dim], torch.double)
        size = step.size[axis]
        assert indices.shape == weights.shape == (size, 3)
        taps = values.index_select(dim, indices.flatten()).unflatten(dim, (size, 3))
        shape = [1, 1, 1, 1]
        shape[dim : dim + 2] = size, 3
        values = (taps * weights.view(shape)).sum(dim + 1)
    return values


@examples(300)
@given(case=single_steps(), seed=st.integers(0, 99))
def test_taps_are_those_of_interpolate(case, seed):
    shape, step = case
    values = torch.randn(2, *shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
    expected = stock_logits(values, (step,))
    assert (by_taps(values, step) - expected).abs().max() <= 1e-12


@pytest.mark.parametrize('align_corners', [False, True])
def test_taps_of_long_axes(align_corners):
    generator = torch.Generator().manual_seed(0)
    for length in (1, 2, 3, 4, 5, 7, 127, 128, 129, 683, 2048):
        for size in (1, 2, 3, 4, 5, 31, 4 * length, 683, 3001):
            values = torch.randn(1, length, 1, dtype=torch.double, generator=generator)
            step = ResizeStep((size, 1), align_corners)
            expected = stock_logits(values, (step,))
            assert (by_taps(values, step) - expected).abs().max() <= 1e-12, (length, size)


@pytest.mark.parametrize('dtype', DTYPES)
def test_weights_are_convex(dtype):
    for align_corners in (False, True):
        for length in (1, 2, 3, 17, 128, 500):
            for size in (1, 2, 5, 33, 128, 512, 683):
                step = ResizeStep((size, size), align_corners)
                for axis in (0, 1):
                    indices, weights = step.taps(axis, length, dtype)
                    assert weights.dtype == torch.double and weights.min() >= 0
                    assert (weights.sum(1) - 1).abs().max() <= 2 * torch.finfo(dtype).eps
                    assert 0 <= indices.min() and indices.max() < length


# --- What is spared ---


SHAPE = (150, 32, 44)
STEPS = (ResizeStep((128, 176)), ResizeStep((200, 300)))
FIRST_MAPS = 150 * 128 * 176
FULL_MAPS = 150 * 200 * 300


@pytest.fixture
def resized(monkeypatch):
    """Number of maps that went through each call of a step."""
    counts = []
    call = ResizeStep.__call__
    monkeypatch.setattr(ResizeStep, '__call__', lambda self, maps: (counts.append(len(maps)), call(self, maps))[1])
    return counts


def regions(seed=0):
    """Logits as trained networks give them: most classes lie far below the ten or so that the image shows."""
    generator = torch.Generator().manual_seed(seed)
    shown = torch.randperm(150, generator=generator)[:10]
    winners = shown[torch.randint(0, 10, (2, 4), generator=generator)]
    winners = F.interpolate(winners[None, None].float(), size=SHAPE[1:])[0, 0].long()
    logits = torch.randn(SHAPE, generator=generator) - 20
    logits[shown] += 20
    return logits + 10 * F.one_hot(winners, 150).permute(2, 0, 1)


def test_counting_sees_stock(resized):
    """What the next tests count is there to be counted."""
    with Largest() as largest:
        module.resize_all(regions(), STEPS).argmax(0)
    assert largest.elements == FULL_MAPS and sum(resized) == 300


@pytest.mark.parametrize('layout', ['contiguous', 'channels last'])
def test_confident_logits_are_hardly_resized(layout, resized):
    logits = in_layout(regions(), layout, 0)
    with Largest() as largest:
        labels = label_map(logits, STEPS)
    assert sum(resized) <= 6
    assert largest.elements < FIRST_MAPS / 4
    assert_same(labels, stock(logits, STEPS))


def test_only_classes_in_doubt_are_resized(resized):
    logits = regions()
    # A class that wins somewhere, once more under another number.
    logits[149] = logits[int(logits[:, 0, 0].argmax())]
    with Largest() as largest:
        labels = label_map(logits, STEPS)
    # Two classes, and a few more at borders at most, in two steps.
    assert 4 <= sum(resized) <= 12
    assert largest.elements < FIRST_MAPS / 4
    assert_same(labels, stock(logits, STEPS))


@pytest.mark.parametrize('layout', ['contiguous', 'channels last'])
def test_of_noise_all_classes_are_resized_but_never_together(layout, resized):
    logits = in_layout(make_logits('noise', SHAPE, 1, torch.float32, 0), layout, 0)
    with Largest() as largest:
        labels = label_map(logits, STEPS)
    assert sum(resized) >= 300
    # A few maps at a time.
    assert largest.elements <= module.GROUP * FULL_MAPS / len(logits)
    assert_same(labels, stock(logits, STEPS))


def test_tiles_are_resized_in_chunks(monkeypatch):
    """Noise in the tiles, where every class is left in every tile."""
    monkeypatch.setattr(module, 'CROWDED', 1e9)
    logits = make_logits('noise', SHAPE, 1, torch.float32, 0)
    with Largest() as largest:
        labels = label_map(logits, STEPS)
    assert largest.elements < FULL_MAPS / 4
    assert_same(labels, stock(logits, STEPS))


@examples(100)
@given(case=cases(), chunk=st.sampled_from([1, 5_000, 50_000]))
def test_chunks_do_not_matter(case, chunk):
    *how, steps = case
    logits = logits_of(*how)
    expected = stock(logits, steps)
    with mock.patch.multiple(module, CHUNK=chunk, CROWDED=1e9):
        assert_same(label_map(logits, steps), expected)


# --- Accelerators ---

# What PyTorch says on an Apple GPU, and on an Intel GPU without fp64 (whose name only a PyTorch for it lets pass).
NO_DOUBLE = (
    TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."),
    RuntimeError('Required aspect fp64 is not supported on the device'),
)


MOST = (module.MOST, 1)
"""By default all classes at once, as the cases are small; then as few as ever."""


@pytest.mark.parametrize(
    ('kind', 'refusal'),
    [('mps', NO_DOUBLE[0]), ('xla', NO_DOUBLE[1]), ('xla', None)],
    ids=['mps', 'without fp64', 'with fp64'],
)
def test_labels_on_another_device_are_those_of_its_own_arithmetic(kind, refusal):
    """The device is played by the CPU: that a real one has all these operations, and resizes a map in the same way
    whatever maps are beside it, this does not show."""

    @examples(60)
    @given(
        case=cases(classes=(2, 4, 5, 19), dtypes=(torch.float32, torch.bfloat16, torch.float16)),
        odd=st.sampled_from([None, None, torch.nan, torch.inf, -torch.inf]),
        most=st.sampled_from(MOST),
    )
    def check(case, odd, most):
        *how, steps = case
        values = logits_of(*how).clone()
        if odd is not None:
            values[:: len(values) // 2, 0, -1] = odd
        device = Device(kind, refusal, rounds_otherwise=True)
        with device, mock.patch.object(module, 'MOST', most):
            logits = device.put(values)
            labels, expected = label_map(logits, steps), stock(logits, steps)
        assert labels.device == device.device
        assert_same(labels.values, expected.values)

    check()


def test_on_an_accelerator_classes_are_resized_in_groups(resized, monkeypatch):
    for kind in ('noise', 'tied'):
        logits = make_logits(kind, SHAPE, 1, torch.float32, 0)
        for groups in (1, 3, 150 // module.GROUP):
            monkeypatch.setattr(module, 'MOST', -(-FULL_MAPS // groups))
            resized.clear()
            with Largest() as largest:
                labels = module.argmax_in_groups(logits, STEPS)
            assert len(resized) == 2 * groups and sum(resized) == 300
            assert largest.elements <= -(-150 // groups) * 200 * 300
            assert_same(labels, stock(logits, STEPS), f'{kind}, {groups}')


def test_the_other_device_keeps_its_rules():
    """What the tests above stand on."""
    device = Device('mps', NO_DOUBLE[0])
    with device:
        ones = device.put(torch.ones(2))
        assert (ones + 1).device == device.device and (ones + 1).cpu().tolist() == [2, 2]
        for wrong in (ones.double, lambda: torch.ones(2, dtype=torch.double, device=device.device)):
            with pytest.raises(TypeError, match='float64'):
                wrong()
        with pytest.raises(TypeError, match='float64'):
            torch.ones(2, dtype=torch.double).to(device.device)
        with pytest.raises(AssertionError, match='same device'):
            ones + torch.ones(2)
        assert ones.cpu().double().dtype is torch.double
    for size, align_corners in (((9, 7), False), ((3, 20), True), ((1, 1), False)):
        maps = torch.randn(1, 2, 4, 5, generator=torch.Generator().manual_seed(0))
        expected = F.interpolate(maps, size=size, mode='bilinear', align_corners=align_corners)
        assert (upsample(maps, size, align_corners) - expected).abs().max() < 1e-6
