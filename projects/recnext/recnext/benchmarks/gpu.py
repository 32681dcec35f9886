"""An accelerator measured in one run: testing in every precision and form, training, and where the time goes.

What is compared, one after the other, is mmseg's EncoderDecoder and ours. What does not come to its turn in time, or
fails, is named, and the rest goes on: such a machine may be at hand for minutes only.
"""

import contextlib
import gc
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from time import monotonic, perf_counter
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS
from torch import Tensor, nn

from ..openmmlab.config import TRAINING_KEYS, load_segmentor_config
from ..openmmlab.listing import leaves
from ..openmmlab.runner import build_runner, run_on
from ..runtimes.deployment import DTYPES, Deployment
from ..utils.devices import AUTO, describe_device, find_device, out_of_memory, single_precision, synchronize
from ..utils.errors import UserError
from ..utils.files import make_folder
from ..utils.memory import can_tell_peak, peak_memory, reset_peak
from .gpu_tables import draw_measurements, format_measurements
from .measurement import FAST, STAGES, STOCK, Trial, build_contender, copies_at, initial_weights, measure_peak
from .testing import prepare_comparison, write_results
from .training import COMPILED_WAYS, WAYS, measure_training

PRECISIONS = ('fp32', 'tf32', 'bf16', 'fp16')
EXECUTIONS: dict[str, dict] = dict(
    eager={}, contiguous=dict(channels_last=False), graph=dict(engine='cudagraph'), compiled=dict(engine='compile')
)
"""Ways to execute the network, and what each is of a :class:`Deployment`."""

COMPILING = 60
"""Seconds that must be left before something is compiled."""

ROWS = 12
"""Operations that are listed of a profile."""


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Args:
        sizes: Heights and widths of the images, as on the disk.
        batches: Images that are tested together.
        images: Tested for each figure, or twice the batch if that is more.
        whole: Images of a whole test.
        training_batch: Images of an iteration.
        rounds: Iterations of training for each figure.
        short_side: That testing resizes images to, if not the config's.
        crop: Sides of the images in training, if not the config's.
    """

    sizes: tuple[tuple[int, int], ...] = ((512, 683), (768, 1024))
    batches: tuple[int, ...] = (1, 8, 32)
    images: int = 16
    whole: int = 128
    training_batch: int = 16
    rounds: int = 10
    short_side: int | None = None
    crop: int | None = None


FULL = Plan()
TINY = Plan(((48, 64), (72, 96)), (1, 2), 2, 6, 2, 1, 64, 64)
"""To try everything where there is no GPU."""


@dataclass(frozen=True)
class Form:
    """A way to run the network in testing.

    Args:
        whose: :data:`STOCK` or :data:`FAST`.
        precision: One of :data:`PRECISIONS`. TF32 rounds the factors of float32; mmseg's 16 bits are autocast's.
        execution: One of :data:`EXECUTIONS`; ``'graph'`` is a CUDA graph of the eager network.
    """

    whose: str
    precision: str
    execution: str = 'eager'

    def __str__(self) -> str:
        return f'{self.whose}, {self.precision}' + ('' if self.execution == 'eager' else f', {self.execution}')


def list_forms(executions: tuple[str, ...]) -> list[Form]:
    """All forms with one of these executions; mmseg's own is eager only."""
    forms = [Form(FAST, precision, execution) for execution in executions for precision in PRECISIONS]
    return [*(Form(STOCK, precision) for precision in PRECISIONS if 'eager' in executions), *forms]


SELECTED = Form(STOCK, 'fp32'), Form(FAST, 'fp32'), Form(FAST, 'bf16')
"""Of which whole tests and profiles are made; and on CUDA the last as a graph."""


def build_form(cfg: Config, weights: dict[str, Tensor], form: Form, device: torch.device) -> nn.Module:
    """The segmentor in a form."""
    single = form.precision in ('fp32', 'tf32')
    way = Deployment(precision='fp32' if single else form.precision, **EXECUTIONS[form.execution])
    segmentor = build_contender(cfg, weights, None if form.whose == STOCK else way, device)
    if form.whose == STOCK and not single:
        segmentor.predict = torch.autocast(device.type, DTYPES[form.precision])(segmentor.predict)
    return segmentor


class Session:
    """What has been measured, until the time is up.

    Args:
        seconds: From now on.
    """

    def __init__(self, seconds: float) -> None:
        self.began = monotonic()
        self.seconds = seconds
        self.skipped: dict[str, str] = {}
        self.failed: dict[str, str] = {}

    def attempt(self, name: str, work: Callable[[], Any], needs: float = 0) -> Any:  # noqa: ANN401
        """What the work returns; None, and a word on it, if there is no time for it or it fails.

        Args:
            name: Of the work.
            work: What is done.
            needs: Seconds that must be left for it.
        """
        left = self.seconds - (monotonic() - self.began)
        if left <= needs:
            self.skipped[name] = f'no time: {max(left, 0):.0f} of {self.seconds:.0f} s were left'
            return None
        print(f'{monotonic() - self.began:6.0f} s  {name}', flush=True)
        try:
            return work()
        except Exception as error:  # whatever a machine that is measured for the first time raises
            if isinstance(error, RuntimeError) and out_of_memory(error):
                self.skipped[name] = 'too little memory'
            else:
                self.failed[name] = f'{type(error).__name__}: {error}'
            return None
        finally:
            gc.collect()


def benchmark_gpu(
    config: str,
    checkpoint: str | None = None,
    device: str = AUTO,
    seconds: int = 600,
    tiny: bool = False,
    work_dir: str | None = None,
    data_root: str | None = None,
    cfg_options: dict | None = None,
) -> dict:
    """Measure this machine's accelerator; see ``recnext benchmark-gpu --help``.

    Writes ``gpu.json`` and ``gpu.png`` into the work dir and prints the tables.

    Returns:
        What is in the JSON file.

    Raises:
        UserError: what is missing or does not fit, before anything is measured; in the end, what failed.
    """
    session, plan = Session(seconds), TINY if tiny else FULL
    where = find_device(device)
    cfg = load_segmentor_config(config, cfg_options)
    checkpoint = prepare_comparison(cfg, config, checkpoint, work_dir, data_root)
    shrink(cfg, plan)
    make_folder(cfg.work_dir)
    init_default_scope('mmseg')
    MMLogger.get_current_instance().setLevel('ERROR')
    results = dict(
        config=Path(config).stem,
        checkpoint=checkpoint and Path(checkpoint).name,
        machine=dict(device=describe_device(where), kind=where.type, torch=torch.__version__, cuda=torch.version.cuda),
        plan=asdict(plan),
        testing=[],
        whole_tests={},
        training={},
        profiles={},
    )
    with tempfile.TemporaryDirectory() as folder:
        measurer = Testing(cfg, initial_weights(cfg, checkpoint), plan, where, Path(folder))
        results['machine']['peak_gflops'] = session.attempt('peak', partial(measure_peaks, where))

        def test(executions: tuple[str, ...], needs: float = 0) -> None:
            for form in list_forms(executions):
                for batch in plan.batches:
                    found = session.attempt(f'{form}, batch {batch}', partial(measurer.measure, form, batch), needs)
                    results['testing'] += found or []

        def train(ways: dict[str, dict[str, bool]], needs: float = 0) -> None:
            for name, way in ways.items():
                work = partial(measure_training, cfg, {name: way}, plan.training_batch, plan.rounds, where)
                found = session.attempt(f'training, {name}', work, needs)
                results['training'] |= found or {}

        # What is worth most comes first: the time may not be enough for all.
        graphed = [replace(SELECTED[-1], execution='graph')] if where.type == 'cuda' else []
        for form in (*SELECTED, *graphed):
            for overlap in (False, True):
                name = f'{form}, {"overlapped" if overlap else "one batch after the other"}'
                work = partial(measurer.test_whole, form, plan.batches[1], overlap)
                results['whole_tests'][name] = session.attempt(f'whole test, {name}', work)
        train(WAYS)
        for form in SELECTED:
            results['profiles'][str(form)] = session.attempt(f'profile of {form}', partial(measurer.profile, form))
        test(('eager',))
        if where.type == 'cuda':
            test(('graph',))
        else:
            session.skipped['CUDA graphs'] = f'not on {where.type}'
        test(('contiguous',))
        test(('compiled',), COMPILING)
        train(COMPILED_WAYS, COMPILING)
    results |= dict(skipped=session.skipped, failed=session.failed, seconds=monotonic() - session.began)
    print(format_measurements(results))
    write_results(results, Path(cfg.work_dir, 'gpu.json'), draw_measurements)
    if session.failed:
        said = [f'{name}: {error[:200]}' for name, error in session.failed.items()]
        raise UserError('\n  '.join([f'{len(said)} of the measurements failed:', *said[:10]]))
    return results


def shrink(cfg: Config, plan: Plan) -> None:
    """Set a config to the sides of images that a plan names; in place."""
    if plan.short_side:
        for dataset in leaves(cfg.test_dataloader.dataset):
            for step in dataset.pipeline:
                if step['type'] == 'Resize':
                    step['scale'] = (4 * plan.short_side, plan.short_side)
    if plan.crop:
        cfg.crop_size = cfg.model.data_preprocessor.size = (plan.crop, plan.crop)


def measure_peaks(device: torch.device) -> dict[str, float]:
    """GFLOP/s of large products and convolutions, as :func:`measurement.measure_peak`, in full precision and TF32."""
    peaks = {}
    for name, tf32 in (('fp32', False), ('tf32', True)):
        with single_precision(tf32):
            peaks[name] = measure_peak(device)
    return peaks


class Loaded:
    """The samples of a dataset, loaded once; each time that one is asked for, it is as good as new."""

    def __init__(self, dataset: Sequence[dict]) -> None:
        self.samples = [dataset[index] for index in range(len(dataset))]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        sample = self.samples[index]
        return dict(inputs=sample['inputs'], data_samples=sample['data_samples'].new())


class Testing:
    """Figures of testing.

    Args:
        cfg: With the test set, of which the first images are copied in the sizes of the plan.
        weights: For its model.
        plan: What is measured.
        device: Where.
        folder: For the copies.
    """

    def __init__(self, cfg: Config, weights: dict[str, Tensor], plan: Plan, device: torch.device, folder: Path) -> None:
        self.cfg, self.weights, self.plan, self.device = cfg, weights, plan, device
        self.configs, self.datasets = {}, {}
        for size in plan.sizes:
            copy = Config(cfg.to_dict())
            copies_at(copy, size, max(plan.batches), folder / str(size))
            copy.update(work_dir=str(folder / 'work'), log_level='ERROR')
            self.configs[size] = copy
            self.datasets[size] = DATASETS.build(copy.test_dataloader.dataset)
        self.genuine: dict[tuple[int, int], list[np.ndarray]] = {}

    @contextlib.contextmanager
    def built(self, form: Form) -> Iterator[nn.Module]:
        """A segmentor in a form, gone afterwards with all that it kept."""
        with torch.no_grad(), single_precision(form.precision == 'tf32'):
            yield build_form(self.cfg, self.weights, form, self.device)
        torch.compiler.reset()
        gc.collect()
        if self.device.type != 'cpu':
            torch.get_device_module(self.device).empty_cache()

    def measure(self, form: Form, batch: int) -> list[dict]:
        """Test batches in all sizes, of images that are loaded already.

        Returns:
            For each size: ``milliseconds`` an image by stage, medians over the batches; ``images_per_second``, loading
            left out; ``first_seconds``, the first batch, in which libraries choose their algorithms; ``memory_mb``, the
            peak with weights; ``different_pixels`` of all ``pixels`` from mmseg in fp32.
        """
        found, all_genuine = [], {size: self._genuine_labels(size) for size in self.datasets}
        with self.built(form) as segmentor:
            trial = Trial(segmentor, self.datasets[self.plan.sizes[0]], self.device, whole=form.execution != 'eager')
            for size, dataset in self.datasets.items():
                trial.dataset, genuine = Loaded(dataset), all_genuine[size]
                indices = [index % len(dataset) for index in range(batch)]
                first = trial.time(indices)['image']
                labels = trial.test(indices)
                before = reset_peak(self.device) if can_tell_peak(self.device) else None
                readings = [
                    trial.time([(start + index) % len(dataset) for index in range(batch)])
                    for start in range(0, max(self.plan.images, 2 * batch), batch)
                ]
                stages = {
                    stage: median(reading.get(stage, 0) for reading in readings) * 1e3 / batch
                    for stage in ('image', *STAGES)
                }
                found.append(
                    dict(
                        **asdict(form),
                        batch=batch,
                        size=size,
                        images_per_second=1e3 / stages.pop('image'),
                        milliseconds=stages,
                        first_seconds=first,
                        memory_mb=None if before is None else peak_memory(self.device),
                        different_pixels=sum(
                            int((ours != genuine[index % len(genuine)]).sum()) for index, ours in enumerate(labels)
                        ),
                        pixels=sum(map(np.size, labels)),
                    )
                )
        return found

    def _genuine_labels(self, size: tuple[int, int]) -> list[np.ndarray]:
        """mmseg's in fp32, of each image in a size."""
        if size not in self.genuine:
            with self.built(Form(STOCK, 'fp32')) as segmentor:
                dataset = self.datasets[size]
                trial = Trial(segmentor, dataset, self.device, whole=False)
                self.genuine[size] = [trial.test([index])[0] for index in range(len(dataset))]
        return self.genuine[size]

    def test_whole(self, form: Form, batch: int, overlap: bool) -> float:
        """Images per second of the Runner's test loop, data loading and metrics included, in the first size.

        Args:
            form: Of the network.
            batch: Images at once.
            overlap: See :class:`OverlappedTestLoop`.
        """
        cfg = Config(self.configs[self.plan.sizes[0]].to_dict())
        cfg.update(dict.fromkeys(TRAINING_KEYS))
        cfg.test_cfg.type = 'OverlappedTestLoop' if overlap else 'TestLoop'
        loader = cfg.test_dataloader
        times = -(-self.plan.whole // len(self.datasets[self.plan.sizes[0]]))
        loader.dataset = dict(type='RepeatDataset', dataset=loader.dataset, times=times)
        loader.update(batch_size=batch, pin_memory=overlap and self.device.type != 'cpu')
        with self.built(form) as segmentor, run_on(self.device):
            runner = build_runner(cfg)
            runner.model = segmentor
            loop = runner.build_test_loop(cfg.test_cfg)
            runner.call_hook('before_run')
            loop.run()  # the first one starts the workers, and much else
            synchronize(self.device)
            began = perf_counter()
            loop.run()
            seconds = perf_counter() - began
            runner.call_hook('after_run')
            return len(loop.dataloader.dataset) / seconds

    def profile(self, form: Form) -> dict:
        """Where the time of a batch of the second size of batches goes.

        Returns:
            ``seconds`` of the batch; ``busy``, the share of them in which the device computed; ``operations``, those
            that took it longest, with ``calls`` and ``milliseconds``.
        """
        dataset, batch = self.datasets[self.plan.sizes[0]], self.plan.batches[1]
        indices = [index % len(dataset) for index in range(batch)]
        with self.built(form) as segmentor:
            trial = Trial(segmentor, dataset, self.device, whole=False)
            trial.test(indices)
            synchronize(self.device)
            with torch.profiler.profile() as profiler:
                began = perf_counter()
                trial.test(indices)
                synchronize(self.device)
                seconds = perf_counter() - began
        clock = 'self_cpu_time_total' if self.device.type == 'cpu' else 'self_device_time_total'
        # What a device does is also listed under its own name, beside the operation that asked for it.
        asked = [event for event in profiler.key_averages() if event.device_type.name == 'CPU']
        events = sorted(asked, key=lambda event: getattr(event, clock), reverse=True)
        return dict(
            seconds=seconds,
            busy=sum(getattr(event, clock) for event in events) / 1e6 / seconds,
            operations=[
                dict(name=event.key, calls=event.count, milliseconds=getattr(event, clock) / 1e3)
                for event in events[:ROWS]
            ],
        )
