"""ML programs, Core ML's newer format, executed: https://apple.github.io/coremltools/mlmodel/Format/MIL.html."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from google.protobuf.message import Message
from torch import Tensor

from .coreml_evaluator import CoreMLEvaluator, UnknownOperation, resize_bilinear, resize_nearest, resolve_zeros

if TYPE_CHECKING:
    from coremltools.converters.mil.mil import Operation, Var

Constant = np.ndarray | np.generic | str | bool | int | float | None
"""What coremltools gives as the value of a constant."""

Argument = Tensor | str | bool | int | float | None | list['Argument']
"""What an operation is called with."""

DTYPES = dict(fp16=torch.float16, fp32=torch.float32, int32=torch.int32, int16=torch.int16, bool=torch.bool)
INTEGERS = dict(int8=torch.int8, uint8=torch.uint8)
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

    def _value(self, var: 'Var | Sequence[Var]') -> Argument:
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
        stride = [1, 1] if strides is None else strides.tolist()
        dilation = [1, 1] if dilations is None else dilations.tolist()
        return F.conv2d(x, weight, bias, stride, self._padding(pad_type, pad), dilation, int(groups))

    def op_matmul(self, x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
        return (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)

    def op_cast(self, x: Tensor, dtype: str) -> Tensor:
        return x.to(DTYPES[dtype])

    def op_quantize(
        self, input: Tensor, scale: Tensor, output_dtype: str, zero_point: Tensor | None = None, axis: int | None = None
    ) -> Tensor:
        scale, zero_point = _along(axis, input, scale), _along(axis, input, zero_point)
        dtype = INTEGERS[output_dtype]
        limits = torch.iinfo(dtype)
        return (torch.round(input / scale) + zero_point).clamp(limits.min, limits.max).to(dtype)

    def op_dequantize(
        self, input: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: int | None = None
    ) -> Tensor:
        return (input.float() - _along(axis, input, zero_point)) * _along(axis, input, scale)

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
        return x.reshape(resolve_zeros(shape.tolist(), x.shape))

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


def _along(axis: int | None, x: Tensor, values: Tensor | float | None) -> Tensor:
    """Scales or zero points of a quantisation, of the whole of ``x`` or along an axis, so that they multiply it."""
    values = torch.as_tensor(0 if values is None else values).float()
    return (
        values
        if axis is None or not values.ndim
        else values.reshape([-1 if dim == int(axis) % x.ndim else 1 for dim in range(x.ndim)])
    )


def _plain(value: Constant) -> Argument:
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
