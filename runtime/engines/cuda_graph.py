"""A call as a CUDA graph: what it launches is recorded once, and replayed as one launch."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

WARM_UP = (
    3  # calls before the recording, as PyTorch's documentation has it: libraries choose and allocate in them
)
_capturing = threading.Lock()


def captured(call: Callable[[], None], device: torch.device, pool: tuple[int, int]) -> Callable[[], None]:
    """`call`, which reads and writes the same tensors every time, as a graph; on the caller's stream when replayed.

    pool: `torch.cuda.graph_pool_handle()`, the memory that graphs share of which one runs at a time.
    """
    # CUDA allows one capture at a time; other threads may wait for their own work meanwhile. Where a capture fails, the
    # outer `stream` puts the caller's back.
    with _capturing, torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            call()
    return graph.replay
