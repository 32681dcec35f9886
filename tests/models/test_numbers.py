"""Within which bounds the numbers agree: between precisions, between numbers of threads, on every released variant."""

import copy
from pathlib import Path

import pytest
import torch
from helpers.networks import threads
from helpers.reference import SEGMENTORS, config_of
from helpers.segmentors import (
    BOUNDS,
    build,
    deviation,
    head_logits,
    initialise,
    raw_images,
    sample_of,
    smooth_images,
    step,
)
from mmengine.config import Config

from projects.recnext.recnext.predict.model import load_deployed
from projects.recnext.recnext.runtimes.deployment import Deployment
from projects.recnext.recnext.utils.errors import UserError


def segmentor_of(arch, gain):
    cfg = Config.fromfile(config_of(arch)).model
    cfg.backbone.init_cfg = None
    return initialise(build(cfg, 'FastEncoderDecoder'), gain=gain)


@pytest.fixture(
    scope='module',
    params=[arch if arch in ('m3', 'a3') else pytest.param(arch, marks=pytest.mark.full) for arch in SEGMENTORS],
)
def segmentor(request):
    """Weights with which the recursion of the largest networks fits into float16 as well."""
    return segmentor_of(request.param, 0.5)


@pytest.fixture(scope='module')
def images():
    return smooth_images(1, (96, 128))


@pytest.mark.every(4)
@pytest.mark.parametrize('dtype', BOUNDS, ids=str)
def test_precisions_agree(segmentor, images, dtype):
    """Each in the form that is tested by default, against the plain network."""
    expected = head_logits(segmentor, images)
    model = copy.deepcopy(segmentor)
    model.switch_to_deploy()
    model.to_dtype_and_layout(dtype, True)
    logits, (close, agree) = head_logits(model, images), BOUNDS[dtype]
    assert deviation(logits, expected) < close
    assert (logits.argmax(1) == expected.argmax(1)).double().mean() >= agree


@pytest.mark.full
@pytest.mark.parametrize('number', [2, 3])
def test_threads_agree(segmentor, images, number):
    """A sum in another order rounds otherwise; beyond that the number of threads changes nothing."""
    with threads(1):
        expected = head_logits(segmentor, images)
        assert torch.equal(head_logits(segmentor, images), expected)
    with threads(number):
        logits = head_logits(segmentor, images)
        assert torch.equal(head_logits(segmentor, images), logits)
    assert deviation(logits, expected) < BOUNDS[torch.float32][0]
    assert (logits.argmax(1) == expected.argmax(1)).double().mean() >= BOUNDS[torch.float32][1]


@pytest.mark.every(2)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_what_float16_cannot_hold_is_refused(dtype):
    model = segmentor_of('a5', 0.7)
    size = (64, 96)
    model.to_dtype_and_layout(dtype, True)
    images, samples = raw_images([size]), [sample_of(size)]
    if dtype is torch.bfloat16:
        assert step(model, images, samples)[0].seg_logits.data.isfinite().all()
    else:
        with pytest.raises(UserError, match='--precision bf16'):
            step(model, images, samples)


@pytest.mark.full
@pytest.mark.parametrize(('precision', 'agree'), [('fp16', 0.999), ('bf16', 0.998)])
def test_labels_of_real_images(real_m3, ade20k_sample, precision, agree):
    photo = min(ade20k_sample.rglob('*.jpg'), key=lambda path: Path(path).stat().st_size)
    expected, found = (
        load_deployed('recnext_m3_ade20k', real_m3, deployment=Deployment(precision=each))(photo)
        for each in ('fp32', precision)
    )
    assert (found.labels == expected.labels).mean() >= agree
