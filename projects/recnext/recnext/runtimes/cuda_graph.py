"""A network as CUDA graphs: what its many small operations ask of the GPU, recorded once and replayed as one.

Starting an operation takes the processor several microseconds, however short the operation is. One image through
RecNeXt is hundreds of them, and a fast GPU waits for most.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

MOST_GRAPHS = 16
"""Recorded sizes of images that are kept, each with its input; the one that was used longest ago goes first."""


class GraphedNetwork:
    """Images (N, 3, H, W) to logits, as ``network`` computes them, on an NVIDIA GPU.

    A size that comes for the first time runs as it is, for recording takes longer than running; the second time it is
    recorded, and replayed from then on. Several threads may call it; streams have graphs of their own.

    Args:
        network: It must not ask the GPU for numbers.
    """

    def __init__(self, network: Callable[[Tensor], Tensor]) -> None:
        self.network = network
        self._seen: set[Hashable] = set()
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._pools: dict[int, tuple[int, int]] = {}
        self._lock = threading.Lock()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        stream = torch.cuda.current_stream(images.device).cuda_stream
        key = stream, images.device, images.dtype, tuple(images.shape), images.stride()
        if key not in self._seen:
            # Libraries choose their algorithms and take their memory, which a recording may not do.
            self._seen.add(key)
            return self.network(images)
        with self._lock:
            graph = self._graphs.get(key)
            if graph is None:
                if len(self._graphs) == MOST_GRAPHS:
                    self._graphs.popitem(last=False)
                # Graphs of one stream never run at once, and so share their memory.
                pool = self._pools.setdefault(stream, torch.cuda.graph_pool_handle())
                graph = self._graphs[key] = _Graph(self.network, images, pool)
            self._graphs.move_to_end(key)
            # Alone: between the copy of its input and the end of a replay no other thread may use the graph.
            return graph.replay(images)


class _Graph:
    def __init__(self, network: Callable[[Tensor], Tensor], images: Tensor, pool: tuple[int, int]) -> None:
        self.images = images.clone()
        self.graph = torch.cuda.CUDAGraph()
        # Recorded on a stream of its own; other threads go on meanwhile.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode='thread_local'):
            self.logits = network(self.images)

    def replay(self, images: Tensor) -> Tensor:
        self.images.copy_(images)
        self.graph.replay()
        # The memory of the recorded logits is the next replay's as well.
        return self.logits.clone()
