"""What is recorded as a CUDA graph and when; the GPU that records is played here. tests/gpu has a real one."""

import threading
from types import SimpleNamespace

import pytest
import torch
from helpers.segmentors import pair, recnext_cfg
from helpers.tools import assert_user_error, run_tool

from projects.recnext.recnext.runtimes import cuda_graph
from projects.recnext.recnext.runtimes.cuda_graph import MOST_GRAPHS, GraphedNetwork
from projects.recnext.recnext.runtimes.deployment import Deployment, deploy
from projects.recnext.recnext.utils.errors import UserError


class Recording:
    """In the place of a graph: runs the network, and counts."""

    lock: threading.Lock

    def __init__(self, network, images, pool):
        self.network, self.shape, self.pool, self.replays = network, images.shape, pool, 0

    def replay(self, images):
        assert images.shape == self.shape and self.lock.locked()
        self.replays += 1
        return self.network(images)


@pytest.fixture
def stream(monkeypatch) -> SimpleNamespace:
    """The current one, by number."""
    stream, pools = SimpleNamespace(cuda_stream=1), iter(range(99))
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: stream)
    monkeypatch.setattr(torch.cuda, 'graph_pool_handle', lambda: next(pools))
    monkeypatch.setattr(cuda_graph, '_Graph', Recording)
    return stream


def watched(network) -> GraphedNetwork:
    graphed = GraphedNetwork(network)
    Recording.lock = graphed._lock
    return graphed


def images_of(width: int) -> torch.Tensor:
    return torch.full((1, 3, 2, width), float(width))


def test_a_size_is_recorded_when_it_comes_again(stream):
    graphed = watched(lambda images: images + 1)
    for width, recorded in ((4, 0), (5, 0), (4, 1), (4, 1), (5, 2), (6, 2)):
        assert torch.equal(graphed(images_of(width)), images_of(width) + 1)
        assert len(graphed._graphs) == recorded
    assert [graph.replays for graph in graphed._graphs.values()] == [2, 1]


def test_other_layouts_types_and_streams_have_graphs_of_their_own(stream):
    graphed = watched(lambda images: images)
    images = torch.rand(2, 3, 4, 4)
    for number, other in enumerate((images, images.double(), images.to(memory_format=torch.channels_last))):
        graphed(other), graphed(other)
        assert len(graphed._graphs) == number + 1
    stream.cuda_stream = 2
    graphed(images), graphed(images)
    pools = [graph.pool for graph in graphed._graphs.values()]
    assert pools[:3] == pools[:1] * 3 and pools[3] != pools[0]


def test_of_too_many_sizes_the_one_used_longest_ago_goes(stream):
    graphed = watched(lambda images: images)
    for width in range(MOST_GRAPHS):
        graphed(images_of(width)), graphed(images_of(width))
    graphed(images_of(0))
    graphed(images_of(99)), graphed(images_of(99))
    kept = {graph.shape[-1] for graph in graphed._graphs.values()}
    assert kept == {*range(MOST_GRAPHS), 99} - {1}


def test_without_a_gpu_it_is_refused(monkeypatch, tiny, tmp_path):
    config, checkpoint = tiny
    if not torch.cuda.is_available():
        result = run_tool('test', config, checkpoint, '--work-dir', tmp_path / 'work', '--engine', 'cudagraph')
        assert_user_error(result, 'cudagraph runs on an NVIDIA GPU, and PyTorch finds none here', '--engine torch')
        assert not (tmp_path / 'work').exists()
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    with pytest.raises(UserError, match='cudagraph runs on an NVIDIA GPU, and the network is on cpu'):
        deploy(pair(recnext_cfg(5))[1], Deployment(engine='cudagraph'))
    result = run_tool('infer', config, checkpoint, tmp_path, '--engine', 'cudagraph', '--device', 'cpu')
    assert result.returncode == 1 and 'Traceback' not in result.stderr
