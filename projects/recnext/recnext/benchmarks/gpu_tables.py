"""What :func:`gpu.benchmark_gpu` measured, as tables and as a picture."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from .measurement import FAST, STAGES, STOCK
from .tables import STAGE_COLOURS
from .training import format_training

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = dict(fp32='#2b6cb0', tf32='#63a4dd', bf16='#dd6b20', fp16='#d69e2e')
STYLES = dict(eager='-o', contiguous='-.v', graph='--s', compiled=':^')


def name_of(point: dict) -> str:
    """Of the form of a measurement of testing."""
    execution = '' if point['execution'] == 'eager' else f', {point["execution"]}'
    return f'{point["whose"]}, {point["precision"]}{execution}'


def format_measurements(results: dict) -> str:
    """All results as text."""
    parts = (_machine, _testing, _whole_tests, _training, _profiles, _left_out)
    return '\n'.join(line for part in parts for line in part(results))


def _machine(results: dict) -> Iterator[str]:
    machine = results['machine']
    yield f'\n{results["config"]}, {results["checkpoint"] or "random weights"}'
    peaks = machine['peak_gflops'] or {}
    reached = ', '.join(f'{speed:.0f} GFLOP/s in {name}' for name, speed in peaks.items())
    yield f'{machine["device"]}, torch {machine["torch"]}; large products and convolutions reach {reached or "?"}'


def _testing(results: dict) -> Iterator[str]:
    for size in results['plan']['sizes']:
        for batch in results['plan']['batches']:
            points = _points(results, size, batch)
            if not points:
                continue
            stock = _stock_speed(points)
            yield f'\nTesting images of {size[0]} x {size[1]}, {batch} at once: ms per image by stage'
            stages = ''.join(f'{stage:>9}' for stage in STAGES)
            yield f'{"":<22}{stages} images/s  ratio  first s  peak MB  different'
            for point in points:
                times = (point['milliseconds'][stage] for stage in STAGES)
                shown = ''.join(f'{time:9.2f}' if time else f'{"-":>9}' for time in times)
                ratio = f'{point["images_per_second"] / stock:7.2f}' if stock else f'{"-":>7}'
                memory = f'{point["memory_mb"]:9.0f}' if point['memory_mb'] else f'{"-":>9}'
                different = f'{point["different_pixels"]} of {point["pixels"]}'
                speed = f'{point["images_per_second"]:9.1f}{ratio}{point["first_seconds"]:9.2f}'
                yield f'{name_of(point):<22}{shown}{speed}{memory}  {different}'


def _whole_tests(results: dict) -> Iterator[str]:
    measured = {name: speed for name, speed in results['whole_tests'].items() if speed}
    if measured:
        height, width = results['plan']['sizes'][0]
        batch = results['plan']['batches'][1]
        yield f'\nWhole tests by the Runner, from the disk to the metrics; {height} x {width}, {batch} at once'
        slowest = next(iter(measured.values()))
        yield from (f'{name:<44}{speed:9.1f} images/s {speed / slowest:6.2f}' for name, speed in measured.items())


def _training(results: dict) -> Iterator[str]:
    if results['training']:
        yield f'\nTraining, {results["plan"]["training_batch"]} images per iteration'
        yield 'float32 as PyTorch has it: in convolutions TF32, where there is any'
        yield format_training(results['training'])


def _profiles(results: dict) -> Iterator[str]:
    for name, profile in results['profiles'].items():
        if profile is None:
            continue
        yield f'\n{name}: {profile["seconds"] * 1e3:.1f} ms per batch, {profile["busy"]:.0%} of them in operations'
        for operation in profile['operations']:
            yield f'{operation["milliseconds"]:10.2f} ms {operation["calls"]:6} x  {operation["name"][:80]}'


def _left_out(results: dict) -> Iterator[str]:
    for title, group in (('Skipped', results['skipped']), ('Failed', results['failed'])):
        if group:
            yield f'\n{title}'
            yield from (f'  {name}: {reason[:200]}' for name, reason in group.items())
    yield f'\n{results["seconds"]:.0f} s'


def _points(results: dict, size: tuple[int, int], batch: int) -> list[dict]:
    return [point for point in results['testing'] if tuple(point['size']) == tuple(size) and point['batch'] == batch]


def _stock_speed(points: list[dict]) -> float | None:
    """mmseg's in fp32."""
    genuine = (point for point in points if (point['whose'], point['precision']) == (STOCK, 'fp32'))
    return next((point['images_per_second'] for point in genuine), None)


def draw_measurements(results: dict, file: str | Path | BinaryIO) -> None:
    """Bars of the time of an image by stage, curves over the batches, and bars of training, as a PNG in ``file``."""
    from matplotlib.figure import Figure

    sizes, batches = results['plan']['sizes'], results['plan']['batches']
    figure = Figure(figsize=(15, 12), layout='constrained')
    figure.suptitle(f'{results["config"]} on {results["machine"]["device"]}, torch {results["machine"]["torch"]}')
    grid = figure.subplots(2, 2, height_ratios=(3, 2))
    for axes, size in zip(grid[0], sizes):
        _draw_stages(axes, _points(results, size, batches[0]))
        axes.set_xlabel(f'ms per image, {size[0]} × {size[1]}, {batches[0]} at once')
    grid[0][0].legend(ncols=5, fontsize='x-small', loc='lower center', bbox_to_anchor=(0.5, 1))
    _draw_speeds(grid[1][0], results, sizes[0])
    _draw_training(grid[1][1], results)
    figure.savefig(file, dpi=110, format='png')


def _draw_stages(axes: 'Axes', points: list[dict]) -> None:
    points, stock = points[::-1], _stock_speed(points)
    names, left = [name_of(point) for point in points], [0.0] * len(points)
    for stage, colour in zip(STAGES, STAGE_COLOURS):
        widths = [point['milliseconds'][stage] for point in points]
        axes.barh(names, widths, left=left, color=colour, label=stage)
        left = [before + width for before, width in zip(left, widths)]
    for index, point in enumerate(points):
        ratio = f'{point["images_per_second"] / stock:.2f} ×, ' if stock else ''
        axes.text(left[index], index, f' {ratio}{point["different_pixels"]} px', va='center', fontsize='x-small')
    axes.set_xlim(right=max(left, default=1) * 1.25)


def _draw_speeds(axes: 'Axes', results: dict, size: tuple[int, int]) -> None:
    points = [point for point in results['testing'] if tuple(point['size']) == tuple(size)]
    for name in dict.fromkeys(map(name_of, points)):
        chosen = [point for point in points if name_of(point) == name]
        first = chosen[0]
        axes.plot(
            [point['batch'] for point in chosen],
            [point['images_per_second'] for point in chosen],
            STYLES[first['execution']],
            color=COLOURS[first['precision']],
            alpha=1 if first['whose'] == FAST else 0.35,
            label=name,
            markersize=4,
        )
    axes.set_xscale('log', base=2)
    axes.set_xticks(results['plan']['batches'], results['plan']['batches'])
    axes.set_yscale('log')
    axes.set_xlabel(f'images at once, {size[0]} × {size[1]}')
    axes.set_ylabel('images per second, without loading')
    if points:
        axes.legend(fontsize='x-small', ncols=2)


def _draw_training(axes: 'Axes', results: dict) -> None:
    if not results['training']:
        axes.set_axis_off()
        return
    names = list(results['training'])[::-1]
    times = [results['training'][name]['milliseconds'] for name in names]
    axes.barh(names, times, color='#2b6cb0')
    for index, name in enumerate(names):
        memory = results['training'][name]['megabytes']
        said = f' {times[index]:.0f} ms' + (f', {memory:.0f} MB' if memory else '')
        axes.text(times[index], index, said, va='center', fontsize='x-small')
    axes.set_xlim(right=max(times, default=1) * 1.3)
    axes.set_xlabel(f'ms per iteration of {results["plan"]["training_batch"]} images')
