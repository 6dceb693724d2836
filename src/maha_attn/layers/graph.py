"""A decoding step as a CUDA graph: recorded once, replayed for every token that follows."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from maha_attn.layers.cache import AttentionCache

WARMUPS = 2
"""Steps before recording: kernels are compiled and libraries have set themselves up."""


class GraphedStep:
    """One step of a function over fixed tensors and caches, replayed without the host's work.

    A step of a whole model launches some hundred small kernels, which the host cannot hand over as
    fast as a GPU runs them; a graph is handed over at once. Recording leaves the caches as they
    were: only a replay is a step.

    Args:
        step: From tokens to outputs, a function of the caches beside them. It must not look at
            what the device computes.
        x: Tokens of one step, on a CUDA device; fixes shape and dtype.
        caches: All that the step continues, filled, with room for the tokens to come.

    Raises:
        ValueError: ``x`` is not on a CUDA device, or a cache has no room for one more token.

    Example::

        step = GraphedStep(lambda x: layer(x, cache=cache), x, [cache])
        for x in tokens:
            y = step(x)
    """

    def __init__(
        self, step: Callable[[Tensor], Tensor], x: Tensor, caches: Sequence[AttentionCache]
    ) -> None:
        if not x.is_cuda:
            raise ValueError(f"x must be on a CUDA device, got {x.device}")
        self.caches = list(caches)
        self.states = [cache.ready() for cache in caches]
        self._check_room()
        self.x, seen = x.clone(), [cache.seen for cache in caches]
        lengths = [state.lengths.clone() for state in self.states]
        self.graph = torch.cuda.CUDAGraph()

        def put_back() -> None:
            for cache, state, tokens, slots in zip(
                self.caches, self.states, lengths, seen, strict=True
            ):
                state.lengths.copy_(tokens)
                cache.seen = slots

        with torch.no_grad():
            stream = torch.cuda.Stream(x.device)
            stream.wait_stream(torch.cuda.current_stream(x.device))
            with torch.cuda.stream(stream):
                for _ in range(WARMUPS):
                    step(self.x)
                    put_back()
            torch.cuda.current_stream(x.device).wait_stream(stream)
            with torch.cuda.graph(self.graph):
                self.y = step(self.x)
        for cache, slots in zip(self.caches, seen, strict=True):
            cache.seen = slots

    def __call__(self, x: Tensor) -> Tensor:
        """Continue the caches by the tokens ``x``; the result is overwritten by the next step.

        Raises:
            ValueError: A cache is full, or holds other tensors than at recording (its rows were
                selected, it was reset, or it has grown).
        """
        self._check_room()
        self.x.copy_(x)
        self.graph.replay()
        for cache in self.caches:
            cache.seen += 1
        return self.y

    def _check_room(self) -> None:
        for cache, state in zip(self.caches, self.states, strict=True):
            if cache.state is not state:
                raise ValueError("cache holds other tensors than were recorded; record a new graph")
            if cache.seen >= cache.capacity:
                raise ValueError(
                    f"cache has room for {cache.capacity} tokens and has seen {cache.seen}; make "
                    "it with a larger capacity, and record a new graph"
                )
