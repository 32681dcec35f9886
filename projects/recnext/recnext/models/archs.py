"""The released variants of RecNeXt, all on one screen."""

from collections.abc import Mapping, Sequence

from ..utils.errors import UserError

ARCHS = {
    f'{family}{size}': dict(
        channels=tuple(width * 2**stage for stage in range(4)),
        depths=depths,
        mlp_ratio=mlp_ratio[family],
        token_mixer=token_mixer,
    )
    for family, token_mixer in (('m', 'conv'), ('a', 'attn'))
    for size, width, depths, mlp_ratio in (
        (0, 40, (2, 2, 9, 1), dict(m=2, a=2)),
        (1, 48, (3, 3, 15, 2), dict(m=2, a=2)),
        (2, 56, (3, 3, 15, 2), dict(m=2, a=2)),
        (3, 64, (3, 3, 13, 2), dict(m=2, a=1.875)),
        (4, 64, (5, 5, 25, 4), dict(m=2, a=1.875)),
        (5, 80, (7, 7, 35, 2), dict(m=2, a=1.875)),
    )
}
"""``m0`` ... ``m5`` and ``a0`` ... ``a5``. ``channels`` and ``depths``: width and number of blocks of each of
the four stages. ``mlp_ratio``: hidden channels of a channel mixer for each of its own. ``token_mixer``: ``'conv'``
(RecConv) or ``'attn'`` (RecAttn)."""

STAGES = 4
TOKEN_MIXERS = ('conv', 'attn')


def get_arch(arch: str | Mapping) -> dict:
    """The settings of ``arch``: a name in :data:`ARCHS`, or a dict with exactly the keys that those have.

    Raises:
        UserError: an unknown name, a missing or unknown key, or a value that makes no network.
    """
    if isinstance(arch, str):
        if arch not in ARCHS:
            raise UserError(f'Unknown RecNeXt arch {arch!r}. Choose one of: {", ".join(ARCHS)}; or give a dict.')
        return ARCHS[arch]
    keys = set(ARCHS['m0'])
    if not isinstance(arch, Mapping):
        raise UserError(f'A RecNeXt arch is a name or a dict; found {arch!r}.')
    if set(arch) != keys:
        raise UserError(f'A RecNeXt arch dict has the keys {sorted(keys)}; found {sorted(arch)}.')
    for key in ('channels', 'depths'):
        numbers = arch[key]
        whole = isinstance(numbers, Sequence) and all(isinstance(number, int) and number > 0 for number in numbers)
        if not whole or len(numbers) != STAGES:
            raise UserError(f'A RecNeXt arch has {STAGES} stages; found {key} {numbers}.')
    if arch['channels'][0] < 2 or int(arch['mlp_ratio'] * arch['channels'][0]) < 1:
        raise UserError(f'No channels are left with channels {arch["channels"]} and mlp_ratio {arch["mlp_ratio"]}.')
    if arch['token_mixer'] not in TOKEN_MIXERS:
        raise UserError(f'token_mixer is one of {", ".join(TOKEN_MIXERS)}; found {arch["token_mixer"]!r}.')
    for stage, (width, before) in enumerate(zip(arch['channels'][1:], arch['channels']), start=1):
        if width != 2 * before:
            raise UserError(
                f'Every stage of a RecNeXt has twice the channels of the one before; stage {stage} has {width} '
                f'after {before}.'
            )
    return dict(arch)
