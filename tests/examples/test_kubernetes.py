"""The manifests, held against the schemas that Kubernetes and Kubeflow publish, and against our command line."""

import re
import shlex

import pytest
import yaml
from helpers.reference import ROOT
from torch.distributed.run import parse_args

from projects.recnext.recnext.cli.main import build_parser
from projects.recnext.recnext.utils.paths import find_config

FOLDER = ROOT / 'examples' / 'kubernetes'


def read(name: str) -> list[dict]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


@pytest.mark.parametrize('version', ['1.31', pytest.param('1.35', marks=pytest.mark.full)])
def test_the_job_fits_the_schemas_of_kubernetes(version):
    kubernetes_validate = pytest.importorskip('kubernetes_validate')
    for document in read('indexed_job.yaml'):
        kubernetes_validate.validate(document, version, strict=True)
    document['spec']['completionsMode'] = 'Indexed'
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, version, strict=True)


def test_the_trainjob_fits_the_models_of_kubeflow():
    models = pytest.importorskip('kubeflow_trainer_api.models')
    (document,) = read('trainjob.yaml')
    parsed = models.TrainerV1alpha1TrainJob.from_dict(document)
    # A model drops what it does not know.
    assert parsed.to_dict() == document


def arguments_of(name: str) -> list[str]:
    document = read(name)[-1]['spec']
    if name == 'trainjob.yaml':
        words = shlex.split(document['trainer']['args'][0])
        assert words[:3] == ['exec', 'python', '-m'] and not re.search(r'\n', document['trainer']['args'][0].strip())
        return words[3:]
    (container,) = document['template']['spec']['containers']
    return [*container['command'][2:], *container['args']]


@pytest.mark.parametrize('name', ['indexed_job.yaml', 'trainjob.yaml'])
def test_the_commands_are_ours_and_torchruns(name):
    module, *rest = arguments_of(name)
    assert module == 'torch.distributed.run'
    torchrun = parse_args(rest)
    assert torchrun.module and torchrun.training_script == 'projects.recnext.recnext'
    assert torchrun.rdzv_backend == 'c10d' and torchrun.max_restarts == 10
    train = build_parser().parse_args(torchrun.training_script_args)
    assert train.command == 'train' and train.resume == 'auto' and train.launcher == 'pytorch' and train.store
    find_config(train.config)
    if name == 'indexed_job.yaml':
        service, job = read(name)
        least, most = map(int, torchrun.nnodes.split(':'))
        assert job['spec']['completions'] == job['spec']['parallelism'] == most
        per_machine = job['spec']['template']['spec']['containers'][0]['resources']['limits']['nvidia.com/gpu']
        assert int(torchrun.nproc_per_node) == per_machine
        numbers = [machines * per_machine for machines in range(least, most + 1)]
        assert [number for number in numbers if train.total_batch_size % number] == []
        names = service['metadata']['name'], job['spec']['template']['spec']['subdomain']
        assert torchrun.rdzv_endpoint == f'{job["metadata"]["name"]}-0.{names[0]}:29500' and names[0] == names[1]
