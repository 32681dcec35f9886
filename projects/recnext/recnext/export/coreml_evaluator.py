"""A saved Core ML model, read back from disk and executed without Core ML, in the precision that it declares.

Prediction with Core ML needs macOS. This executes the operations of the file itself, with PyTorch, one after the other,
so that what was written can be compared with the network it came from on any machine. Both of Core ML's formats:
https://apple.github.io/coremltools/mlmodel/Format/MIL.html and https://apple.github.io/coremltools/mlmodel/Format/NeuralNetwork.html.
"""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from google.protobuf.message import Message
from torch import Tensor

from ..utils.errors import UserError

if TYPE_CHECKING:
    from coremltools.converters.mil.mil import Operation, Var


class UnknownOperation(UserError):
    """An operation of the saved model that is not known here."""

    def __init__(self, kind: str, path: Path) -> None:
        super().__init__(f'{path} has the operation {kind}, which cannot be executed here to verify it.')


class CoreMLEvaluator:
    """Base of the two formats.

    Attributes:
        spec: The specification that was read.
        operations: Their number by type, without constants.
        multiply_adds: Of the last image, in convolutions and matrix products.
    """

    def __init__(self, path: Path, spec: Message) -> None:
        self.path = path
        self.spec = spec
        self.operations: Counter[str] = Counter()
        self.multiply_adds = 0

    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """Execute the model.

        Args:
            image: (1, 3, H, W), the values of the one input.

        Returns:
            The outputs by name; and as ``'scores'`` what the labels are the argmax of, where there is an argmax.

        Raises:
            UnknownOperation: with the name of the operation.
        """
        raise NotImplementedError

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, **geometry: object) -> Tensor:
        out = F.conv2d(x, weight, bias, **geometry)
        self.multiply_adds += out.numel() * weight[0].numel()
        return out

    def _product(self, x: Tensor, y: Tensor) -> Tensor:
        out = x @ y
        self.multiply_adds += out.numel() * x.shape[-1]
        return out


def open_model(path: str | Path) -> CoreMLEvaluator:
    """Read a saved ``.mlpackage`` or ``.mlmodel``."""
    import coremltools

    path = Path(path)
    model = coremltools.models.MLModel(str(path), skip_model_load=True)
    kind = ProgramEvaluator if model.get_spec().WhichOneof('Type') == 'mlProgram' else NetworkEvaluator
    return kind(path, model.get_spec(), model.weights_dir)


def resize_bilinear(x: Tensor, scale: tuple[float, float], align_corners: bool) -> Tensor:
    """(N, C, H, W) to (N, C, floor(scale · H), floor(scale · W)), sampled at the scale that the file gives."""
    if align_corners:
        size = [int(length * factor) for length, factor in zip(x.shape[2:], scale)]
        return F.interpolate(x, size=size, mode='bilinear', align_corners=True)
    # The interpolation of a 16-bit operation is exact up to the rounding of its result.
    return F.interpolate(x, scale_factor=scale, mode='bilinear', align_corners=False, recompute_scale_factor=False)


def resize_nearest(x: Tensor, scale: tuple[float, float]) -> Tensor:
    """(N, C, H, W) to (N, C, floor(scale · H), floor(scale · W)); pixel i is taken from floor(i / scale)."""
    for dim, factor in zip((2, 3), scale):
        length = int(x.shape[dim] * factor)
        x = x.index_select(dim, (torch.arange(length) / factor).long().clamp(max=x.shape[dim] - 1))
    return x


# --- ML programs -------------------------------------------------------------------------------------------------

DTYPES = dict(fp16=torch.float16, fp32=torch.float32, int32=torch.int32, int16=torch.int16, bool=torch.bool)
GELU = dict(EXACT='none', TANH_APPROXIMATION='tanh')


class ProgramEvaluator(CoreMLEvaluator):
    """An ML program: operations on tensors of declared types. 16-bit operations accumulate in 32 bits, and round."""

    def __init__(self, path: Path, spec: Message, weights: str) -> None:
        from coremltools.converters.mil.frontend.milproto.load import load

        super().__init__(path, spec)
        program = load(spec, spec.specificationVersion, weights)
        self.function = program.functions['main']
        self.operations.update(op.op_type for op in self._executed())

    def _executed(self) -> list['Operation']:
        return [
            op for op in self.function.operations if op.op_type != 'const' and not op.op_type.startswith('constexpr')
        ]

    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        self.multiply_adds = 0
        (name,) = self.function.inputs
        self.values = {name: torch.from_numpy(image).float()}
        scores = {}
        for op in self._executed():
            if not hasattr(self, f'op_{op.op_type}'):
                raise UnknownOperation(op.op_type, self.path)
            arguments = {key: self._value(var) for key, var in op.inputs.items()}
            if op.op_type == 'reduce_argmax':
                scores['scores'] = arguments['x'].numpy()
            results = getattr(self, f'op_{op.op_type}')(**arguments)
            for var, result in zip(op.outputs, results if isinstance(results, (list, tuple)) else [results]):
                self.values[var.name] = _rounded(result, var)
        return {**{var.name: self.values[var.name].numpy() for var in self.function.outputs}, **scores}

    def _value(self, var: 'Var') -> object:
        """The value of an argument: a tensor, a number, a word, or a list of them."""
        if isinstance(var, (list, tuple)):
            return [self._value(one) for one in var]
        if var.name in self.values:
            return self.values[var.name]
        if var.op is not None and var.op.op_type.startswith('constexpr'):
            value = var.op.materialized_val_inference()
        else:
            value = var.val
        value = _plain(value)
        if isinstance(value, torch.Tensor) and value.ndim:
            self.values[var.name] = value
        return value

    # What each operation does; the arguments are those of the specification.

    def _padding(self, pad_type: str, pad: Tensor | None) -> list[int]:
        if pad_type == 'valid':
            return [0, 0]
        if pad_type != 'custom' or pad[0] != pad[1] or pad[2] != pad[3]:
            raise UnknownOperation(f'conv with {pad_type} padding {pad}', self.path)
        return [int(pad[0]), int(pad[2])]

    def op_conv(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, strides: Tensor | None = None,
        pad_type: str = 'valid', pad: Tensor | None = None, dilations: Tensor | None = None, groups: int = 1,
    ) -> Tensor:  # fmt: skip
        geometry = dict(stride=[1, 1] if strides is None else strides.tolist(), groups=int(groups))
        geometry['dilation'] = [1, 1] if dilations is None else dilations.tolist()
        return self._convolve(x, weight, bias, padding=self._padding(pad_type, pad), **geometry)

    def op_matmul(self, x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
        return self._product(x.mT if transpose_x else x, y.mT if transpose_y else y)

    def op_cast(self, x: Tensor, dtype: str) -> Tensor:
        return x.to(DTYPES[dtype])

    def op_add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def op_sub(self, x: Tensor, y: Tensor) -> Tensor:
        return x - y

    def op_mul(self, x: Tensor, y: Tensor) -> Tensor:
        return x * y

    def op_real_div(self, x: Tensor, y: Tensor) -> Tensor:
        return x / y

    def op_pow(self, x: Tensor, y: Tensor) -> Tensor:
        return x**y

    def op_relu(self, x: Tensor) -> Tensor:
        return x.relu()

    def op_elu(self, x: Tensor, alpha: float) -> Tensor:
        return F.elu(x, float(alpha))

    def op_gelu(self, x: Tensor, mode: str = 'EXACT') -> Tensor:
        return F.gelu(x, approximate=GELU[mode])

    def op_sigmoid(self, x: Tensor) -> Tensor:
        return x.sigmoid()

    def op_greater(self, x: Tensor, y: Tensor) -> Tensor:
        return x > y

    def op_reshape(self, x: Tensor, shape: Tensor) -> Tensor:
        return x.reshape(_resolve_zeros(shape.tolist(), x.shape))

    def op_transpose(self, x: Tensor, perm: Tensor) -> Tensor:
        return x.permute(perm.tolist())

    def op_squeeze(self, x: Tensor, axes: Tensor) -> Tensor:
        return x.squeeze(axes.tolist())

    def op_expand_dims(self, x: Tensor, axes: Tensor) -> Tensor:
        for axis in axes.tolist():
            x = x.unsqueeze(axis)
        return x

    def op_split(
        self, x: Tensor, axis: int, split_sizes: Tensor | None = None, num_splits: int | None = None
    ) -> tuple[Tensor, ...]:
        sizes = x.shape[axis] // num_splits if split_sizes is None else split_sizes.tolist()
        return x.split(sizes, int(axis))

    def op_concat(self, values: list[Tensor], axis: int, interleave: bool = False) -> Tensor:
        if interleave:
            raise UnknownOperation('concat with interleave', self.path)
        return torch.cat([torch.atleast_1d(torch.as_tensor(value)) for value in values], int(axis))

    def op_slice_by_index(
        self, x: Tensor, begin: Tensor, end: Tensor, stride: Tensor | None = None, begin_mask: Tensor | None = None,
        end_mask: Tensor | None = None, squeeze_mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        place = []
        for dim in range(x.ndim):
            first = None if begin_mask is not None and begin_mask[dim] else int(begin[dim])
            last = None if end_mask is not None and end_mask[dim] else int(end[dim])
            step = 1 if stride is None else int(stride[dim])
            squeeze = squeeze_mask is not None and squeeze_mask[dim]
            place.append(first if squeeze else slice(first, last, step))
        return x[tuple(place)]

    def op_reverse(self, x: Tensor, axes: Tensor) -> Tensor:
        return x.flip(axes.tolist())

    def op_shape(self, x: Tensor) -> Tensor:
        return torch.tensor(x.shape, dtype=torch.int32)

    def op_gather(self, x: Tensor, indices: Tensor, axis: int, **validate: bool) -> Tensor:
        indices = torch.as_tensor(indices).long()
        shape = [*x.shape[: int(axis)], *indices.shape, *x.shape[int(axis) + 1 :]]
        return x.index_select(int(axis), indices.reshape(-1)).reshape(shape)

    def op_reduce_mean(self, x: Tensor, axes: Tensor, keep_dims: bool = False) -> Tensor:
        return x.mean(axes.tolist(), keepdim=bool(keep_dims))

    def op_reduce_argmax(self, x: Tensor, axis: int = -1, keep_dims: bool = True, **dtype: str) -> Tensor:
        return x.argmax(int(axis), keepdim=bool(keep_dims)).int()

    def op_pixel_shuffle(self, x: Tensor, upscale_factor: int) -> Tensor:
        return F.pixel_shuffle(x, int(upscale_factor))

    def op_upsample_nearest_neighbor(
        self, x: Tensor, scale_factor_height: float = 1, scale_factor_width: float = 1
    ) -> Tensor:
        return resize_nearest(x, (float(scale_factor_height), float(scale_factor_width)))

    def op_upsample_bilinear(
        self, x: Tensor, scale_factor_height: float = 1, scale_factor_width: float = 1, align_corners: bool = True,
        half_pixel_centers: bool | None = None,
    ) -> Tensor:  # fmt: skip
        if half_pixel_centers is not None and bool(half_pixel_centers) == bool(align_corners):
            raise UnknownOperation(f'upsample_bilinear with half_pixel_centers {half_pixel_centers}', self.path)
        return resize_bilinear(x, (float(scale_factor_height), float(scale_factor_width)), bool(align_corners))


def _plain(value: object) -> object:
    """A constant of a program: floating point in single precision, words as they are."""
    if isinstance(value, (str, bool, int, float)) or value is None:
        return value
    array = np.asarray(value)
    if array.dtype.kind in 'US':
        return str(array)
    tensor = torch.from_numpy(array.astype(np.float32) if array.dtype.kind == 'f' else np.ascontiguousarray(array))
    return tensor.reshape(array.shape)


def _rounded(value: Tensor, var: 'Var') -> Tensor:
    """``value`` with the precision of the variable that it is stored in."""
    if value.is_floating_point() and var.dtype.__name__ == 'fp16':
        return value.half().float()
    return value


def _resolve_zeros(shape: list[int], given: torch.Size) -> list[int]:
    """In both formats, 0 in the new shape of a reshape keeps the length that is there."""
    return [given[dim] if length == 0 else length for dim, length in enumerate(shape)]


# --- neural networks ---------------------------------------------------------------------------------------------

AXES = dict(CHANNEL_AXIS=-3, HEIGHT_AXIS=-2, WIDTH_AXIS=-1)


class NetworkEvaluator(CoreMLEvaluator):
    """A neural network, the older format: layers on blobs. Its weights may have 16 bits; it computes with 32 here."""

    def __init__(self, path: Path, spec: Message, weights: str | None) -> None:
        super().__init__(path, spec)
        self.layers = spec.neuralNetwork.layers
        self.operations.update(layer.WhichOneof('layer') for layer in self.layers)
        del self.operations['loadConstantND']
        # The first occurrence of each weight, decoded once.
        self.decoded: dict[int, Tensor] = {}

    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        self.multiply_adds = 0
        values = {self.spec.description.input[0].name: torch.from_numpy(image).float()}
        scores = {}
        for index, layer in enumerate(self.layers):
            kind = layer.WhichOneof('layer')
            if not hasattr(self, f'layer_{kind}'):
                raise UnknownOperation(kind, self.path)
            inputs = [values[name] for name in layer.input]
            if kind == 'argMax':
                scores['scores'] = inputs[0].numpy()
            self.index = index
            results = getattr(self, f'layer_{kind}')(getattr(layer, kind), *inputs)
            for name, result in zip(layer.output, results if isinstance(results, (list, tuple)) else [results]):
                values[name] = result
        return {**{out.name: values[out.name].numpy() for out in self.spec.description.output}, **scores}

    def _weights(self, params: Message, shape: tuple[int, ...], place: int = 0) -> Tensor:
        key = 2 * self.index + place
        if key not in self.decoded:
            half = params.float16Value
            array = np.frombuffer(half, np.float16) if half else np.array(params.floatValue, np.float32)
            if array.size != np.prod(shape, dtype=int):
                raise UnknownOperation('weights that are neither 16 nor 32 bits', self.path)
            self.decoded[key] = torch.from_numpy(array.astype(np.float32)).reshape(shape)
        return self.decoded[key]

    def layer_loadConstantND(self, layer: Message) -> Tensor:
        return self._weights(layer.data, tuple(layer.shape))

    def layer_convolution(self, layer: Message, x: Tensor) -> Tensor:
        if layer.isDeconvolution or layer.WhichOneof('ConvolutionPaddingType') != 'valid':
            raise UnknownOperation('convolution that is transposed or pads by itself', self.path)
        borders = layer.valid.paddingAmounts.borderAmounts
        if any(border.startEdgeSize != border.endEdgeSize for border in borders):
            raise UnknownOperation('convolution with uneven padding', self.path)
        shape = (layer.outputChannels, layer.kernelChannels, *layer.kernelSize)
        bias = self._weights(layer.bias, (layer.outputChannels,), place=1) if layer.hasBias else None
        padding = [border.startEdgeSize for border in borders] or [0, 0]
        geometry = dict(stride=tuple(layer.stride) or 1, dilation=tuple(layer.dilationFactor) or 1)
        return self._convolve(
            x, self._weights(layer.weights, shape), bias, padding=padding, groups=max(1, layer.nGroups), **geometry
        )

    def layer_batchedMatmul(self, layer: Message, x: Tensor, y: Tensor) -> Tensor:
        return self._product(x.mT if layer.transposeA else x, y.mT if layer.transposeB else y)

    def layer_add(self, layer: Message, *inputs: Tensor) -> Tensor:
        return inputs[0] + (inputs[1] if len(inputs) > 1 else layer.alpha)

    def layer_multiply(self, layer: Message, *inputs: Tensor) -> Tensor:
        return inputs[0] * (inputs[1] if len(inputs) > 1 else layer.alpha)

    def layer_divideBroadcastable(self, layer: Message, x: Tensor, y: Tensor) -> Tensor:
        return x / y

    def layer_subtractBroadcastable(self, layer: Message, x: Tensor, y: Tensor) -> Tensor:
        return x - y

    def layer_activation(self, layer: Message, x: Tensor) -> Tensor:
        kind = layer.WhichOneof('NonlinearityType')
        if kind == 'linear':
            return layer.linear.alpha * x + layer.linear.beta
        if kind == 'ELU':
            return F.elu(x, layer.ELU.alpha)
        if kind == 'ReLU':
            return x.relu()
        raise UnknownOperation(f'activation {kind}', self.path)

    def layer_gelu(self, layer: Message, x: Tensor) -> Tensor:
        if layer.mode != layer.EXACT:
            raise UnknownOperation('gelu that is not exact', self.path)
        return F.gelu(x)

    def layer_reshapeStatic(self, layer: Message, x: Tensor) -> Tensor:
        return x.reshape(tuple(layer.targetShape))

    def layer_rankPreservingReshape(self, layer: Message, x: Tensor) -> Tensor:
        return x.reshape(_resolve_zeros(list(layer.targetShape), x.shape))

    def layer_transpose(self, layer: Message, x: Tensor) -> Tensor:
        return x.permute(tuple(layer.axes))

    def layer_squeeze(self, layer: Message, x: Tensor) -> Tensor:
        return x.squeeze() if layer.squeezeAll else x.squeeze(tuple(layer.axes))

    def layer_expandDims(self, layer: Message, x: Tensor) -> Tensor:
        for axis in layer.axes:
            x = x.unsqueeze(axis)
        return x

    def layer_splitND(self, layer: Message, x: Tensor) -> tuple[Tensor, ...]:
        return x.split(list(layer.splitSizes) or x.shape[layer.axis] // layer.numSplits, layer.axis)

    def layer_concatND(self, layer: Message, *inputs: Tensor) -> Tensor:
        return torch.cat(inputs, layer.axis)

    def layer_slice(self, layer: Message, x: Tensor) -> Tensor:
        dim = AXES[layer.SliceAxis.Name(layer.axis)]
        end = layer.endIndex if layer.endIndex >= 0 else x.shape[dim] + layer.endIndex + 1
        index = torch.arange(layer.startIndex, end, max(1, layer.stride))
        return x.index_select(dim, index)

    def layer_sliceStatic(self, layer: Message, x: Tensor) -> Tensor:
        ends = [None if masked else end for end, masked in zip(layer.endIds, layer.endMasks)]
        begins = [None if masked else begin for begin, masked in zip(layer.beginIds, layer.beginMasks)]
        place = list(map(slice, begins, ends, layer.strides))
        for dim, squeeze in enumerate(layer.squeezeMasks):
            if squeeze:
                place[dim] = begins[dim]
        return x[tuple(place)]

    def layer_reverse(self, layer: Message, x: Tensor) -> Tensor:
        return x.flip([dim for dim, reverse in enumerate(layer.reverseDim) if reverse])

    def layer_reduceMean(self, layer: Message, x: Tensor) -> Tensor:
        return x.mean(tuple(layer.axes), keepdim=layer.keepDims)

    def layer_argMax(self, layer: Message, x: Tensor) -> Tensor:
        return x.argmax(layer.axis, keepdim=not layer.removeDim).int()

    def layer_reorganizeData(self, layer: Message, x: Tensor) -> Tensor:
        if layer.mode != layer.PIXEL_SHUFFLE:
            raise UnknownOperation('reorganizeData other than PIXEL_SHUFFLE', self.path)
        return F.pixel_shuffle(x, layer.blockSize)

    def layer_upsample(self, layer: Message, x: Tensor) -> Tensor:
        scale = tuple(map(float, layer.fractionalScalingFactor or layer.scalingFactor))
        if layer.mode == layer.NN:
            return resize_nearest(x, scale)
        if layer.linearUpsampleMode == layer.DEFAULT:
            raise UnknownOperation('upsample in the default mode', self.path)
        return resize_bilinear(x, scale, layer.linearUpsampleMode == layer.ALIGN_CORNERS_TRUE)
