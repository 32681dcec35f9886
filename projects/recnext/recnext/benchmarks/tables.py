"""What :func:`testing.benchmark` found, as a table and as a picture."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from .measurement import FAST, NETWORK, STAGES, STOCK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STAGE_COLOURS = ('#9aa5b1', '#c3cad2', '#2b6cb0', '#63a4dd', '#a8d1f5', '#4a90c2', '#dd6b20', '#718096', '#e2e8f0')


def stock_in(contenders: dict) -> str:
    """What the others are compared with: the first."""
    return next(iter(contenders))


def format_results(results: dict) -> str:
    """All results as text."""
    return '\n'.join(line for section in (_machine, _images, _memory, _gflop, _sweep) for line in section(results))


def _machine(results: dict) -> Iterator[str]:
    machine = results['machine']
    yield f'{results["config"]} on {machine["device"]} ({machine["threads"]} CPU threads), torch {machine["torch"]}'
    size = 'copies at {} x {}'.format(*results['copies_at']) if results['copies_at'] else 'in their own size'
    yield f'images {size}, medians of {results["rounds"]} alternating rounds\n'


def _images(results: dict) -> Iterator[str]:
    stock = results['contenders'][stock_in(results['contenders'])]
    yield f'{"ms per image":<24}' + ''.join(f'{stage:>9}' for stage in STAGES) + ' images/s  ratio'
    for name, result in results['contenders'].items():
        times = (result['milliseconds'][stage] for stage in STAGES)
        shown = ''.join(f'{time:9.1f}' if time else f'{"-":>9}' for time in times)
        ratio = result['images_per_second'] / stock['images_per_second']
        yield f'{name:<24}{shown}{result["images_per_second"]:9.2f}{ratio:7.2f}'
    yield ''
    for name, result in results['contenders'].items():
        counted, score = ('pixels', 'mIoU') if 'mIoU' in result else ('images', 'top1')
        yield (
            f'{name:<24}{result[f"different_{counted}"]:9} of {result[counted]} {counted} different, '
            f'{score} {result[score]:.2f}, logits off by {result["logit_error"]:.1e}'
        )
    yield ''
    fast = results['contenders'][FAST]['milliseconds']
    for what, parts in (
        ('backbone', ('backbone',)),
        ('neck and head', ('neck', 'head')),
        ('network', NETWORK),
        ('logits to labels', ('labels',)),
    ):
        before, after = (sum(times[part] for part in parts) for times in (stock['milliseconds'], fast))
        yield f'{what:<18} {before:8.1f} -> {after:7.1f} ms  {before / after:6.2f} x'
    yield ''


def _memory(results: dict) -> Iterator[str]:
    yield 'Peak memory'
    for name, result in results['contenders'].items():
        memory, process = result['memory_mb'], result['process_mb']
        said = [] if process is None else [f'in all {process:6.0f} MB']
        if memory is not None:
            said += [f'network {memory["network"]:6.0f} MB', f'prediction adds {memory["prediction_adds"]:6.0f} MB']
        yield f'  {name:<24} {", ".join(said)}'
    yield ''
    yield 'From weights in memory to the first logits'
    for name, result in results['contenders'].items():
        yield f'  {name:<24} {result["start_seconds"]:6.1f} s'
    yield ''


def _gflop(results: dict) -> Iterator[str]:
    peak = results['machine']['peak_gflops']
    yield f'Large convolutions and matrix products reach {peak:.0f} GFLOP/s here. The network in single precision:'
    for name in (stock_in(results['contenders']), FAST):
        result = results['contenders'][name]
        for part, gflop in result['gflop'].items():
            speed = gflop / result['milliseconds'][part] * 1e3
            yield (
                f'  {name:<6} {part:<9} {result["parameters"][part] / 1e6:6.2f} M parameters {gflop:7.1f} GFLOP '
                f'{speed:7.0f} GFLOP/s  {speed / peak:5.0%}'
            )
    yield ''


def _sweep(results: dict) -> Iterator[str]:
    for point in results['sweep']:
        times = point['milliseconds']
        yield (
            f'{point["size"]:5} x {point["size"]:<5}{point["classes"]:5} classes, {point["kind"]:<9} '
            f'{times[STOCK]:9.1f} -> {times[FAST]:8.1f} ms {times[STOCK] / times[FAST]:7.1f} x, '
            f'{point["different_pixels"]} pixels different'
        )


def draw_results(results: dict, file: str | Path | BinaryIO) -> None:
    """Bars of the time of an image by stage, and curves of the sweeps, as a PNG in ``file``."""
    from matplotlib.figure import Figure

    sweep = results['sweep']
    figure = Figure(figsize=(13 if sweep else 7.5, 4), layout='constrained')
    panels = figure.subplots(1, 3, width_ratios=(2, 1, 1)) if sweep else [figure.subplots()]
    _draw_stages(panels[0], results['contenders'])
    if sweep:
        _draw_curves(
            panels[1], [p for p in sweep if p['classes'] == 150], 'size', 'height and width (pixels), 150 classes'
        )
        _draw_curves(panels[2], [p for p in sweep if p['size'] == 512], 'classes', 'classes, 512 x 512')
    figure.savefig(file, dpi=110, format='png')


def _draw_stages(axes: 'Axes', contenders: dict) -> None:
    names = list(contenders)[::-1]
    left = [0.0] * len(names)
    for stage, colour in zip(STAGES, STAGE_COLOURS):
        widths = [contenders[name]['milliseconds'][stage] for name in names]
        axes.barh(names, widths, left=left, color=colour, label=stage)
        left = [a + b for a, b in zip(left, widths)]
    for index, name in enumerate(names):
        ratio = contenders[name]['images_per_second'] / contenders[stock_in(contenders)]['images_per_second']
        axes.text(left[index], index, f' {ratio:.2f} x', va='center')
    axes.set_xlim(right=max(left) * 1.18)
    axes.set_xlabel('ms per image')
    axes.legend(ncols=5, fontsize='x-small', loc='lower center', bbox_to_anchor=(0.5, 1))


def _draw_curves(axes: 'Axes', points: list[dict], over: str, label: str) -> None:
    for kind, style in (('confident', '-o'), ('random', '--s')):
        chosen = sorted((p for p in points if p['kind'] == kind), key=lambda p: p[over])
        for name, colour in ((STOCK, '#718096'), (FAST, '#dd6b20')):
            times = [p['milliseconds'][name] for p in chosen]
            axes.plot([p[over] for p in chosen], times, style, color=colour, label=f'{name}, {kind}', markersize=4)
    axes.set_xscale('log', base=2)
    axes.set_yscale('log')
    axes.set_xlabel(label)
    axes.set_ylabel('ms from logits to labels')
    axes.legend(fontsize='x-small')
