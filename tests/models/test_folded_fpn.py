"""The folded neck against mmseg's FPN and FPNHead: any channels, levels and sizes, the border, dtypes, refusals."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import randomise_norms
from helpers.reference import SEGMENTORS
from helpers.strength import examples
from hypothesis import event, given
from hypothesis import strategies as st
from mmseg.models.decode_heads import FCNHead, FPNHead
from mmseg.models.necks import FPN, MLANeck
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from projects.recnext.recnext.models.folding import FoldedFPN, fold_level, folding_saves_flops
from projects.recnext.recnext.models.recnext import ARCHS
from projects.recnext.recnext.openmmlab.segmentor import fold_fpn
from projects.recnext.recnext.utils.errors import UserError

CHANNELS = (3, 4, 20, 40)  # with 10 and 4: two levels that pay, two that do not
FIT = ((16, 24), (8, 12), (4, 6), (2, 3))


pytestmark = pytest.mark.usefixtures('one_thread')


def make(channels=CHANNELS, fpn=10, head=4, dtype=torch.double, neck_args={}, head_args={}, seed=0):
    """A neck and a head in eval mode, with norms and biases as training would leave them."""
    torch.manual_seed(seed)
    start = neck_args.get('start_level', 0)
    levels = len(channels) - start
    neck = FPN(list(channels), fpn, **{'num_outs': levels, **neck_args})
    defaults = dict(
        in_channels=[fpn] * levels,
        in_index=list(range(levels)),
        feature_strides=[4 * 2**level for level in range(levels)],
        channels=head,
        num_classes=5,
        norm_cfg=dict(type='BN'),
    )
    head = FPNHead(**{**defaults, **head_args})
    for part in (neck, head):
        part.to(dtype).eval()
        randomise_norms(part, seed)
        for module in part.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.uniform_(module.bias, -1, 1)
    nn.init.normal_(head.conv_seg.weight)
    return neck, head


def features_of(sizes, channels=CHANNELS, batch=2, dtype=torch.double):
    return tuple(torch.randn(batch, c, *size).to(dtype) for c, size in zip(channels, sizes))


def run(neck, head, features):
    """The segmentor's logits, and what comes out of the first ConvModule at every level."""
    with torch.no_grad():
        outs = neck(features)
        return head(outs), [scale_head[0](out) for scale_head, out in zip(head.scale_heads, outs)]


def deviation(value, reference):
    """Largest difference relative to the largest value of the reference."""
    assert value.shape == reference.shape
    return ((value.double() - reference).abs().max() / reference.abs().max().clamp(min=1e-30)).item()


def assert_same(value, reference, tolerance=1e-12):
    assert value.isfinite().all() and deviation(value, reference) < tolerance


def doubled(top, levels):
    return [tuple(size << (levels - 1 - level) for size in top) for level in range(levels)]


def halved(image, levels):
    return [tuple(-(-size // 2 ** (level + 2)) for size in image) for level in range(levels)]


@st.composite
def cases(draw):
    """Channels, sizes and everything else that FPN and FPNHead leave open."""
    levels = draw(st.integers(2, 4))
    start = draw(st.integers(0, 1))
    top = st.integers(1, 3)
    image = st.integers(1, 100)
    any_size = st.tuples(st.integers(1, 12), st.integers(1, 12))
    exact = st.tuples(top, top).map(lambda size: doubled(size, levels))
    sizes = draw(
        st.one_of(
            exact,
            exact,
            st.tuples(image, image).map(lambda size: halved(size, levels)),
            st.lists(any_size, min_size=levels, max_size=levels),
        )
    )
    return dict(
        channels=draw(st.lists(st.integers(1, 6), min_size=start + levels, max_size=start + levels)),
        fpn=draw(st.integers(4, 10)),
        head=draw(st.integers(1, 4)),
        neck_args=dict(start_level=start),
        head_args=dict(norm_cfg=draw(st.sampled_from([dict(type='BN'), dict(type='SyncBN'), None]))),
        without_bias=draw(st.sets(st.sampled_from(['lateral_convs', 'fpn_convs', 'scale_heads']))),
        sizes=[sizes[0]] * start + sizes,
        batch=draw(st.integers(1, 2)),
        seed=draw(st.integers(0, 99)),
    )


@examples(400)
@given(case=cases())
def test_folding_changes_nothing(case):
    sizes, batch, without_bias = case.pop('sizes'), case.pop('batch'), case.pop('without_bias')
    neck, head = make(**case)
    for part in (neck, head):
        for name, module in part.named_modules():
            if name.split('.')[0] in without_bias and isinstance(module, nn.Conv2d):
                module.bias = None
    features = features_of(sizes, case['channels'], batch)
    logits, maps = run(neck, head, features)
    folded = fold_fpn(neck, head)
    event(f'{len(folded[0].folded)} levels folded')
    folded_logits, folded_maps = run(*folded, features)
    assert_same(folded_logits, logits)
    for value, reference in zip(folded_maps, maps):
        assert_same(value, reference)


BORDER = {
    'first rows': (slice(None, 2), slice(None)),
    'last rows': (slice(-2, None), slice(None)),
    'first columns': (slice(None), slice(None, 2)),
    'last columns': (slice(None), slice(-2, None)),
    **{f'corner {y} {x}': (slice(y, y + 1 or None), slice(x, x + 1 or None)) for y in (0, -1) for x in (0, -1)},
    'interior': (slice(1, -1), slice(1, -1)),
}


@pytest.mark.parametrize('top', [(1, 1), (1, 3), (3, 1), (2, 3)], ids=str)
def test_every_part_of_the_border_is_exact(top):
    # Without activation nothing hides below zero, and every part is measured by its own largest value.
    neck, head = make(head=8, fpn=20, head_args=dict(act_cfg=None))
    features = features_of(doubled(top, 4))
    folded = fold_fpn(neck, head)
    assert folded[0].folded == (0, 1)
    maps, folded_maps = run(neck, head, features)[1], run(*folded, features)[1]
    for level in (0, 1):
        for rows, columns in BORDER.values():
            part = (slice(None), slice(None), rows, columns)
            assert_same(folded_maps[level][part], maps[level][part])
        for y in (0, 1, -1, -2):
            assert_same(folded_maps[level][:, :, y], maps[level][:, :, y])
            assert_same(folded_maps[level][..., y], maps[level][..., y])


def test_the_correction_is_needed_on_each_side_and_reaches_no_further():
    neck, head = make(head_args=dict(act_cfg=None))
    features = features_of(FIT)
    reference = run(neck, head, features)[1][0]
    lines = [(slice(0, 1), slice(None)), (slice(-1, None), slice(None))]
    lines += [(columns, rows) for rows, columns in lines]
    for side, (rows, columns) in enumerate(lines):
        new_neck, new_head = fold_fpn(neck, head)
        nn.init.zeros_(new_neck.levels[0].sides[side][1].weight)
        wrong = (run(new_neck, new_head, features)[1][0] - reference).abs()
        assert wrong[:, :, rows, columns].min() > 1e-9
        wrong[:, :, rows, columns] = 0
        assert wrong.max() < 1e-12


@pytest.mark.parametrize('bias', [True, False], ids=['bias', 'no bias'])
def test_kernels_alone(bias):
    torch.manual_seed(0)
    lateral, inner, outer = nn.Conv2d(3, 7, 1, bias=bias), nn.Conv2d(7, 7, 3, bias=bias), nn.Conv2d(7, 4, 3, bias=bias)
    before = copy.deepcopy([conv.state_dict() for conv in (lateral, inner, outer)])
    kernels = fold_level(lateral, inner, outer)
    for conv, state in zip((lateral, inner, outer), before):
        assert all(torch.equal(tensor, state[key]) for key, tensor in conv.state_dict().items())
        conv.double()
    assert [tuple(kernel.shape) for kernel in kernels[:3]] == [(4, 3, 5, 5), (16, 7, 3, 3), (4,)]
    assert all(kernel.dtype is torch.double for kernel in (*kernels[:3], *sum(kernels.sides, ())))
    # None of these convolutions pads: the interior only.
    feature, above = torch.randn(1, 3, 12, 16).double(), torch.randn(1, 7, 6, 8).double()
    zero = torch.zeros(1, dtype=torch.double)
    b, f, s = (conv.bias if bias else zero for conv in (lateral, inner, outer))
    with torch.no_grad():
        direct = F.conv2d(F.conv2d(F.conv2d(feature, lateral.weight), inner.weight), outer.weight)
        upsampled = F.conv2d(F.conv2d(F.interpolate(above, scale_factor=2), inner.weight), outer.weight)
        merged = F.conv2d(feature, lateral.weight) + b.view(-1, 1, 1) + F.interpolate(above, scale_factor=2)
        constant = F.conv2d(f.view(1, -1, 1, 1).expand(1, 7, 3, 3), outer.weight).flatten() + s
        whole = outer(inner(merged))
        phases = F.pixel_shuffle(F.conv2d(above, kernels.from_above), 2)
        shifted = F.pixel_shuffle(F.conv2d(above + b.view(-1, 1, 1), kernels.from_above), 2)
        ours = F.conv2d(feature, kernels.direct)
    assert_same(ours, direct)
    assert_same(phases, upsampled)
    assert deviation(kernels.bias, constant) < 1e-12 if bias else not kernels.bias.any()
    assert_same(ours + shifted + kernels.bias.view(-1, 1, 1), whole)
    # What the four sides take is what F makes just outside the map, and S carries inwards.
    for (ring, inwards), shape in zip(kernels.sides, [(1, 3), (1, 3), (3, 1), (3, 1)]):
        assert ring.shape == (7, 7, *shape) and inwards.shape == (4, 7, *shape)


@pytest.mark.parametrize('arch', SEGMENTORS)
def test_released_variants_fold_their_two_lowest_levels(arch):
    channels = ARCHS[arch]['channels']
    assert channels == ((80, 160, 320, 640) if arch.endswith('5') else (64, 128, 256, 512))
    assert [i for i, c in enumerate(channels) if folding_saves_flops(c, 256, 128, lowest=i == 0)] == [0, 1]


def test_what_pays_is_counted():
    assert folding_saves_flops(64, 256, 128) and not folding_saves_flops(256, 256, 128)
    assert not folding_saves_flops(3, 8, 8)  # 3 · 8 + 9 · 8 · 8 is 25 · 3 · 8
    # Only the lowest level is spared its lateral map.
    assert folding_saves_flops(23, 64, 66) and not folding_saves_flops(23, 64, 66, lowest=False)


@pytest.mark.parametrize('arch', ['m3', 'm5'])
def test_single_precision_is_as_exact_as_the_plain_path(arch):
    channels = ARCHS[arch]['channels']
    neck, head = make(channels, 256, 128, dtype=torch.float)
    folded = fold_fpn(neck, head)
    assert folded[0].folded == (0, 1)
    # On smaller maps oneDNN's 3×3 convolution is three times less exact, plain or folded.
    features = features_of(doubled((2, 3), 4), channels, 1, torch.float)
    plain = run(neck, head, features)
    ours = run(*folded, features)
    exact = run(neck.double(), head.double(), tuple(feature.double() for feature in features))
    assert deviation(plain[0], exact[0]) < 1e-5
    for a, b, reference in zip((ours[0], *ours[1]), (plain[0], *plain[1]), (exact[0], *exact[1])):
        assert (a - reference).norm() < 1.15 * (b - reference).norm()
        # The largest of thousands of rounding errors is a matter of luck, on either side.
        assert deviation(a, reference) < 3 * deviation(b, reference)


class Shapes(TorchDispatchMode):
    """Records the shape of every tensor that an operation gives."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.seen.add(tuple(tensor.shape))
        return out


@pytest.mark.parametrize('fits', [True, False])
def test_no_map_of_the_fpn_at_the_highest_resolution(fits):
    neck, head = fold_fpn(*make(fpn=11))
    calls = []
    for index, level in enumerate(neck.levels):
        level.fpn_conv.register_forward_hook(lambda *_, index=index: calls.append(index))
    sizes = FIT if fits else ((17, 24), *FIT[1:])
    with Shapes() as shapes:
        run(neck, head, features_of(sizes))
    assert any(shape[-2:] == sizes[0] for shape in shapes.seen)
    assert ((2, 11, *sizes[0]) in shapes.seen) is not fits
    # Level 1 makes the lateral map, which level 0 needs, and nothing else with as many channels.
    assert sorted(calls) == [2, 3] if fits else [0, 2, 3]


@pytest.mark.parametrize(
    ('sizes', 'plain'),
    [
        (FIT, []),
        (((15, 24), *FIT[1:]), [0]),
        (((16, 23), *FIT[1:]), [0]),
        (((17, 25), *FIT[1:]), [0]),
        (((8, 12), *FIT[1:]), [0]),
        (((32, 48), *FIT[1:]), [0]),
        ((*FIT[:2], (5, 6), (3, 3)), [1]),
        ((FIT[0], (8, 11), *FIT[2:]), [0, 1]),
        ((*FIT[:3], (3, 4)), []),
        (((1, 1),) * 4, [0, 1]),
        (((2, 1), (1, 1), (1, 1), (1, 1)), [0, 1]),
        (((2, 2), (1, 1), (1, 1), (1, 1)), [1]),
    ],
)
def test_sizes_that_do_not_fit_take_the_plain_path(sizes, plain):
    neck, head = make()
    new_neck, new_head = fold_fpn(neck, head)
    calls = []
    for index in new_neck.folded:
        new_neck.levels[index].fpn_conv.register_forward_hook(lambda *_, index=index: calls.append(index))
    features = features_of(sizes)
    assert_same(run(new_neck, new_head, features)[0], run(neck, head, features)[0])
    assert sorted(calls) == plain


def test_the_original_is_untouched_and_no_random_number_is_drawn():
    neck, head = make()
    features = features_of(FIT)
    before = copy.deepcopy((neck.state_dict(), head.state_dict())), run(neck, head, features)[0]
    state = torch.get_rng_state()
    new = fold_fpn(neck, head)
    assert torch.equal(torch.get_rng_state(), state)
    for part in new:
        for tensor in part.state_dict().values():
            tensor.zero_()
    for part, old in zip((neck, head), before[0]):
        assert part.state_dict().keys() == old.keys()
        assert all(torch.equal(tensor, old[key]) for key, tensor in part.state_dict().items())
    assert torch.equal(run(neck, head, features)[0], before[1])


def test_folding_is_idempotent():
    neck, head = fold_fpn(*make())
    again = fold_fpn(neck, head)
    assert again[0] is neck and again[1] is head
    assert (
        neck.folded == (0, 1) and [isinstance(s[0], nn.Identity) for s in head.scale_heads] == [True] * 2 + [False] * 2
    )
    for part in (neck, head):
        assert not any(isinstance(module, nn.BatchNorm2d) or module.training for module in part.modules())


def test_where_no_level_pays_only_norms_are_folded():
    neck, head = make((40, 40), 10, 8)
    new_neck, new_head = fold_fpn(neck, head)
    assert isinstance(new_neck, FoldedFPN) and new_neck.folded == ()
    features = features_of(FIT, (40, 40))
    assert all(torch.equal(a, b) for a, b in zip(neck(features), new_neck(features)))
    assert_same(run(new_neck, new_head, features)[0], run(neck, head, features)[0])
    assert not any(isinstance(module, nn.BatchNorm2d) for module in new_head.modules())


@pytest.mark.parametrize('channels_last', [False, True], ids=['nchw', 'channels_last'])
@pytest.mark.parametrize(
    ('dtype', 'tolerance'), [(torch.float, 1e-5), (torch.bfloat16, 0.1), (torch.half, 0.02)], ids=str
)
@pytest.mark.parametrize('first', ['fold', 'convert'])
def test_dtypes_and_memory_formats(dtype, tolerance, channels_last, first):
    neck, head = make()
    features = features_of(FIT)
    reference = run(neck, head, features)[0]
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    parts = fold_fpn(neck, head) if first == 'fold' else (neck, head)
    for part in parts:
        part.to(dtype=dtype, memory_format=memory_format)
    neck, head = parts if first == 'fold' else fold_fpn(*parts)
    assert neck.folded and all(p.dtype == dtype for part in (neck, head) for p in part.parameters())
    features = tuple(feature.to(dtype=dtype, memory_format=memory_format) for feature in features)
    logits, maps = run(neck, head, features)
    assert logits.dtype == dtype and all(m.dtype == dtype for m in maps)
    assert_same(logits, reference, tolerance)
    if channels_last and first == 'fold':
        assert maps[0].is_contiguous(memory_format=torch.channels_last)


def test_autocast():
    neck, head = make(dtype=torch.float)
    features = features_of(FIT, dtype=torch.float)
    reference = run(neck, head, features)[0]
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert_same(run(*fold_fpn(neck, head), features)[0], reference, 0.1)


def test_saves_loads_and_exports():
    neck, head = fold_fpn(*make())
    features = features_of(FIT)
    logits = run(neck, head, features)[0]
    file = io.BytesIO()
    torch.save((neck.state_dict(), head.state_dict()), file)
    file.seek(0)
    other = fold_fpn(*make(seed=1))
    for part, state in zip(other, torch.load(file, weights_only=True)):
        part.load_state_dict(state)
    assert torch.equal(run(*other, features)[0], logits)
    segment = nn.Sequential(neck, head)
    assert_same(torch.export.export(segment, (features,)).module()(features), logits)


@pytest.mark.parametrize('act_cfg', [dict(type='GELU'), dict(type='LeakyReLU'), dict(type='PReLU'), None], ids=str)
def test_the_heads_activation_is_kept(act_cfg):
    neck, head = make(head_args=dict(act_cfg=act_cfg))
    folded = fold_fpn(neck, head)
    assert folded[0].folded == (0, 1)
    features = features_of(FIT)
    assert_same(run(*folded, features)[0], run(neck, head, features)[0])


def test_efficient_norms_are_folded_too():
    neck, head = make()
    features = features_of(FIT)
    reference = run(neck, head, features)[0]
    for module in head.modules():
        if hasattr(module, 'turn_on_efficient_conv_bn_eval'):
            module.turn_on_efficient_conv_bn_eval()
    assert_same(run(*fold_fpn(neck, head), features)[0], reference)


def changed(change, **args):
    def build():
        neck, head = make(**args)
        return change(neck, head) or (neck, head)

    return build


def neck_of(**neck_args):
    return lambda: make(neck_args=neck_args)


def head_of(**head_args):
    return lambda: make(head_args=head_args)


def without_statistics(neck, head):
    head.scale_heads[2][0].bn = nn.BatchNorm2d(4, track_running_stats=False).eval()


def activation_first(neck, head):
    head.scale_heads[3][2].order = ('act', 'conv', 'norm')


def spectral_norm(neck, head):
    neck.fpn_convs[0].with_spectral_norm = True


class OwnFPN(FPN):
    pass


REFUSALS = {
    'another neck': (changed(lambda neck, head: (MLANeck([3], 4).eval(), head)), 'MLANeck in the place of FPN'),
    'no neck': (changed(lambda neck, head: (nn.Identity().eval(), head)), 'Identity in the place of FPN'),
    'a derived neck': (changed(lambda neck, head: (OwnFPN([3], 4, 1).eval(), head)), 'OwnFPN in the place of FPN'),
    'another head': (
        changed(lambda neck, head: (neck, FCNHead(in_channels=4, channels=4, num_classes=5).eval())),
        'FCNHead in the place of FPNHead',
    ),
    'norm in the neck': (neck_of(norm_cfg=dict(type='BN')), r'FPN with a norm \(BatchNorm2d\)'),
    'norm off the laterals': (neck_of(norm_cfg=dict(type='BN'), no_norm_on_lateral=True), 'FPN with a norm'),
    'activation in the neck': (neck_of(act_cfg=dict(type='ReLU')), r'FPN with an activation \(ReLU\)'),
    'bilinear': (neck_of(upsample_cfg=dict(mode='bilinear')), "upsample_cfg={'mode': 'bilinear'}"),
    'scale factor': (neck_of(upsample_cfg=dict(scale_factor=2)), "upsample_cfg={'scale_factor': 2}"),
    'more outputs': (neck_of(num_outs=5), '5 outputs from 4 levels'),
    'extra convolutions': (neck_of(num_outs=5, add_extra_convs='on_input'), 'add_extra_convs=on_input'),
    'fewer outputs used': (
        head_of(in_channels=[10] * 3, in_index=[0, 1, 2], feature_strides=[4, 8, 16]),
        r'in_index=\[0, 1, 2\] on 4 outputs',
    ),
    'another order': (head_of(in_index=[1, 0, 2, 3]), r'in_index=\[1, 0, 2, 3\]'),
    'group norm': (head_of(norm_cfg=dict(type='GN', num_groups=2)), 'FPNHead with GroupNorm'),
    'instance norm': (head_of(norm_cfg=dict(type='IN')), 'FPNHead with InstanceNorm2d'),
    'no statistics': (changed(without_statistics), 'no running statistics'),
    'activation first': (changed(activation_first), 'order act -> conv -> norm'),
    'no ConvModule': (
        changed(lambda neck, head: head.scale_heads[1].__setitem__(0, nn.Identity().eval())),
        'Identity in scale_heads',
    ),
    'another convolution': (neck_of(conv_cfg=dict(type='Conv2dAdaptivePadding')), 'Conv2dAdaptivePadding in lateral'),
    'another in the head': (head_of(conv_cfg=dict(type='Conv2dAdaptivePadding')), 'Padding in scale_heads'),
    'spectral norm': (changed(spectral_norm), 'spectral norm in fpn_convs'),
    'training': (changed(lambda neck, head: (neck.train(), head) and None), r'call \.eval\(\)'),
    'one part training': (changed(lambda neck, head: head.scale_heads[0].train() and None), r'call \.eval\(\)'),
}


def with_conv(name, index, **args):
    def change(neck, head):
        module = head.scale_heads[index][0] if name == 'scale_heads' else getattr(neck, name)[index]
        old = module.conv
        defaults = dict(kernel_size=old.kernel_size, padding=old.padding)
        module.conv = nn.Conv2d(old.in_channels, old.out_channels, **{**defaults, **args}).double().eval()

    return changed(change)


REFUSALS.update(
    {
        'wide lateral': (with_conv('lateral_convs', 0, kernel_size=3, padding=1), r'kernel_size=\(3, 3\) in lateral'),
        'stride': (with_conv('fpn_convs', 3, stride=2), r'stride=\(2, 2\) in fpn_convs'),
        'dilation': (with_conv('scale_heads', 1, dilation=2, padding=2), r'padding=\(2, 2\) in scale_heads'),
        'dilation alone': (with_conv('scale_heads', 1, dilation=2), r'dilation=\(2, 2\) in scale_heads'),
        'padding': (with_conv('fpn_convs', 1, padding=0), r'padding=\(0, 0\) in fpn_convs'),
        'groups': (with_conv('fpn_convs', 1, groups=2), r'groups=2, .* in fpn_convs'),
        'circular': (with_conv('fpn_convs', 0, padding_mode='circular'), "padding_mode='circular' in fpn_convs"),
        '5×5': (with_conv('scale_heads', 0, kernel_size=5, padding=2), r'kernel_size=\(5, 5\) in scale_heads'),
    }
)


@pytest.mark.parametrize('case', REFUSALS)
def test_what_cannot_be_folded_is_refused_by_name(case):
    build, words = REFUSALS[case]
    neck, head = build()
    before = copy.deepcopy((neck.state_dict(), head.state_dict()))
    with pytest.raises(UserError, match=words) as error:
        fold_fpn(neck, head)
    assert '\n' not in str(error.value)
    if 'eval' not in words:
        assert 'can be folded; found' in str(error.value)
    for part, state in zip((neck, head), before):
        assert all(torch.equal(tensor, state[key]) for key, tensor in part.state_dict().items())
