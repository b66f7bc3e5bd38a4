"""What tests ask of a GPU, with what stands for it on a CPU, where the same tests see whether they themselves are right."""

import contextlib

import torch


@contextlib.contextmanager
def waits_are_errors(device="cuda"):
    """Whoever makes the host wait for the GPU raises; a CPU has nobody to wait for."""
    if device == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def recorded(call, device="cuda"):
    """The call's results, and what runs it again and leaves its results in the same tensors: on a GPU a graph of it."""
    if device == "cpu":
        results = [r.clone() for r in call()]

        def again():
            for old, new in zip(results, call(), strict=True):
                old.copy_(new)

        return results, again
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return results, graph.replay
