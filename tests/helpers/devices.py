"""Devices that are not here: played by the CPU, whose tensors go nowhere else unasked and which need not know float64;
and accelerators that are only said to be here."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

UPSAMPLE = torch.ops.aten.upsample_bilinear2d.default


class OnDevice(Tensor):
    """A tensor whose ``device`` is another than that of its values."""

    @staticmethod
    def __new__(cls, values: Tensor, device: torch.device) -> 'OnDevice':
        # 'meta' to PyTorch's C++, which looks for what drives the device.
        return Tensor._make_wrapper_subclass(
            cls, values.shape, values.stride(), values.storage_offset(), dtype=values.dtype, device='meta'
        )

    def __init__(self, values: Tensor, device: torch.device) -> None:
        self.values, self.place = values, device

    @property
    def device(self) -> torch.device:
        return self.place

    def __repr__(self) -> str:
        return f'{self.values} on {self.place}'

    def tolist(self) -> list:
        return self.values.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None):
        raise AssertionError(f'{func} outside of the device')


class Device(TorchDispatchMode):
    """Runs what is asked of a device, under its rules: no tensor of another device among its own, and its dtypes.

    It does not show whether a real device has these operations, nor how it rounds.

    Args:
        kind: Such as ``'mps'``.
        refusal: What the device raises when float64 is asked of it; None for a device that has it.
        rounds_otherwise: Whether its bilinear interpolation has an arithmetic of its own; see :func:`upsample`.
    """

    def __init__(self, kind: str, refusal: Exception | None, rounds_otherwise: bool = False) -> None:
        super().__init__()
        self.device, self.refusal, self.rounds_otherwise = torch.device(kind, 0), refusal, rounds_otherwise
        self.calls: list[str] = []

    def put(self, values: Tensor) -> OnDevice:
        """The same values on this device, in the same memory layout."""
        return OnDevice(values, self.device)

    def __torch_dispatch__(self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None):
        kwargs = kwargs or {}
        given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        ours = [value for value in given if isinstance(value, OnDevice)]
        target = kwargs.get('device')
        target = torch.device(target) if target is not None else None
        made_here = target.type == self.device.type if target else bool(ours)
        if not ours and not made_here:
            return func(*args, **kwargs)
        self.calls.append(str(func))
        # As in PyTorch: a single number of the CPU may be among them, and a copy goes from one to the other.
        copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        others = [value for value in given if not isinstance(value, OnDevice)]
        assert copies or all(value.dim() == 0 and value.device.type == 'cpu' for value in others), (
            f'{func}: Expected all tensors to be on the same device'
        )
        args, kwargs = tree_map(lambda value: value.values if isinstance(value, OnDevice) else value, (args, kwargs))
        if target:
            kwargs['device'] = 'cpu'
        self.refuse(*(value.values for value in ours))
        if made_here and kwargs.get('dtype') is torch.float64:
            self.refuse(torch.empty(0, dtype=torch.float64))
        if func is UPSAMPLE and self.rounds_otherwise:
            made = upsample(*args)
        else:
            made = func(*args, **kwargs)
        if not made_here:
            return made
        written = func._schema.arguments[0].alias_info
        if written is not None and written.is_write:
            return given[0]
        if 'out' in kwargs:
            return next(value for value in ours if value.values is kwargs['out'])
        self.refuse(*(value for value in tree_flatten(made)[0] if isinstance(value, Tensor)))
        return tree_map(lambda value: self.put(value) if isinstance(value, Tensor) else value, made)

    def refuse(self, *tensors: Tensor) -> None:
        if self.refusal is not None and any(tensor.dtype is torch.float64 for tensor in tensors):
            raise self.refusal


def upsample(maps: Tensor, size: Sequence[int], align_corners: bool, *_: float | None) -> Tensor:
    """Bilinear interpolation in single precision by the four products of the corners: not as the CPU rounds it."""
    wide = maps.float()
    (top, bottom, down), (left, right, across) = (
        _neighbours(before, after, align_corners) for before, after in zip(maps.shape[2:], size)
    )
    down = down[:, None]
    made = wide[..., top, :][..., left] * ((1 - down) * (1 - across))
    for rows, columns, weights in (
        (bottom, right, down * across),
        (top, right, (1 - down) * across),
        (bottom, left, down * (1 - across)),
    ):
        made = made + wide[..., rows, :][..., columns] * weights
    return made.to(maps.dtype)


def _neighbours(before: int, after: int, align_corners: bool) -> tuple[Tensor, Tensor, Tensor]:
    places = torch.arange(after, dtype=torch.float32)
    if align_corners:
        places = places * ((before - 1) / max(after - 1, 1))
    else:
        places = ((places + 0.5) * (before / after) - 0.5).clamp(min=0)
    first = places.floor().long().clamp(max=before - 1)
    return first, (first + 1).clamp(max=before - 1), places - first


class Clock:
    """What an accelerator has of its own: events in milliseconds, a stream, and what was asked of it."""

    def __init__(self) -> None:
        self.milliseconds = 0.0
        self.asked: list[tuple] = []

    def event(self, device: torch.device, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        event = SimpleNamespace()
        event.record = lambda stream: setattr(event, 'at', (self.milliseconds, stream))
        event.elapsed_time = lambda other: other.at[0] - event.at[0]
        return event


def pretend(monkeypatch: pytest.MonkeyPatch, kind: str, count: int = 1, **module: Callable) -> Clock:
    """Let PyTorch say that there are accelerators.

    Args:
        monkeypatch: Of the test.
        kind: Such as ``'xpu'``.
        count: How many.
        module: What is in the place of ``torch.xpu``, by name; ``set_device`` is there.

    Returns:
        Their clock, which also remembers what was asked of them.
    """
    clock = Clock()
    own = SimpleNamespace(set_device=lambda index: clock.asked.append(('set_device', index)), **module)
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: True)
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, 'device_count', lambda: count)
    monkeypatch.setattr(torch.accelerator, 'current_stream', lambda device: f'stream of {device}')
    monkeypatch.setattr(torch.accelerator, 'synchronize', lambda device: clock.asked.append(('synchronize', device)))
    monkeypatch.setattr(torch, 'get_device_module', lambda device: own)
    monkeypatch.setattr(torch, 'Event', clock.event)
    return clock
