"""Neural networks, Core ML's older format, executed: https://apple.github.io/coremltools/mlmodel/Format/NeuralNetwork.html."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from google.protobuf.message import Message
from torch import Tensor

from .coreml_evaluator import CoreMLEvaluator, UnknownOperation, resize_bilinear, resize_nearest, resolve_zeros

AXES = dict(CHANNEL_AXIS=-3, HEIGHT_AXIS=-2, WIDTH_AXIS=-1)


class NetworkEvaluator(CoreMLEvaluator):
    """A neural network, the older format: layers on blobs. Its weights may have 16 bits; it computes with 32 here."""

    def __init__(self, path: Path, spec: Message) -> None:
        super().__init__(path, spec)
        self.layers = spec.neuralNetwork.layers
        self.operations.update(layer.WhichOneof('layer') for layer in self.layers)
        del self.operations['loadConstantND']
        # The first occurrence of each weight, decoded once.
        self.decoded: dict[int, Tensor] = {}

    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
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
        stride, dilation = tuple(layer.stride) or 1, tuple(layer.dilationFactor) or 1
        weight = self._weights(layer.weights, shape)
        return F.conv2d(x, weight, bias, stride, padding, dilation, max(1, layer.nGroups))

    def layer_batchedMatmul(self, layer: Message, x: Tensor, y: Tensor) -> Tensor:
        return (x.mT if layer.transposeA else x) @ (y.mT if layer.transposeB else y)

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
        return x.reshape(resolve_zeros(list(layer.targetShape), x.shape))

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
