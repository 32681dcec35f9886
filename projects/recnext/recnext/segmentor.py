"""The segmentor: mmseg's EncoderDecoder, strict about its weights."""

from mmengine.logging import print_log
from mmseg.models import EncoderDecoder
from mmseg.registry import MODELS
from torch import Tensor

from .conversion import Conversion, ConversionError, check_fit, convert, get_state_dict


@MODELS.register_module()
class StrictEncoderDecoder(EncoderDecoder):
    """An EncoderDecoder that takes the released 0.x weights as they are and refuses weights that do not fit.

    mmengine loads with ``strict=False`` and only logs what is missing or left over. Here every way of loading, by
    the Runner, by the inferencers or by ``load_state_dict``, raises a :class:`ConversionError` instead.
    """

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        mine = {key.removeprefix(prefix): state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
        conversion = self.fit(mine)
        if conversion.layout.target == 'legacy':
            print_log(
                f'Weights of mmseg 0.x, arch {conversion.arch}: {len(conversion.mapped)} tensors converted in memory.',
                logger='current',
            )
        state_dict.update({prefix + key: value for key, value in conversion.state_dict.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def fit(self, checkpoint: dict) -> Conversion:
        """The weights in a checkpoint under this network's names, with the account of how they got there.

        Raises:
            ConversionError: not the weights of a segmentor, or they do not fit this network exactly.
        """
        conversion = convert(get_state_dict(checkpoint))
        if not conversion.layout.is_segmentor:
            raise ConversionError(
                f'These are the weights of a backbone (arch {conversion.arch}, {conversion.layout}), not of a '
                'segmentor. To start training from them, set model.backbone.init_cfg.checkpoint to the file.'
            )
        check_fit(conversion.state_dict, self.state_dict(), f'this segmentor; they are of arch {conversion.arch}')
        return conversion
