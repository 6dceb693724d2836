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
        inputs: Its arguments, for one step, on a CUDA device; they fix shapes and dtypes.
        caches: All that the step continues, filled, with room for the tokens to come.

    Raises:
        ValueError: An input is not on a CUDA device, or a cache has no room for one more token.

    Example::

        step = GraphedStep(lambda x: layer(x, cache=cache), [x], [cache])
        for x in tokens:
            y = step(x)
    """

    def __init__(
        self,
        step: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        caches: Sequence[AttentionCache],
    ) -> None:
        for x in inputs:
            if not x.is_cuda:
                raise ValueError(f"inputs must be on a CUDA device, got one on {x.device}")
        self.inputs, self.caches = [x.clone() for x in inputs], list(caches)
        self.states = [cache.ready() for cache in caches]
        self._check_room()
        self.graph = torch.cuda.CUDAGraph()
        seen = [cache.seen for cache in caches]
        lengths = [state.lengths.clone() for state in self.states]
        with torch.no_grad(), torch.cuda.device_of(self.inputs[0]):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARMUPS):
                    step(*self.inputs)
                    # Back to where it was: the next one, and the first replay, write the same.
                    for cache, slots, tokens in zip(caches, seen, lengths, strict=True):
                        cache.seen = slots
                        cache.ready().lengths.copy_(tokens)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self.graph):
                self.output = step(*self.inputs)
        for cache, slots in zip(caches, seen, strict=True):
            cache.seen = slots

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Continue the caches by one step; the result is overwritten by the next.

        Raises:
            ValueError: A cache is full, or holds other tensors than at recording (its rows were
                selected, it was reset, or it has grown).
        """
        self._check_room()
        for fixed, x in zip(self.inputs, inputs, strict=True):
            fixed.copy_(x)
        self.graph.replay()
        for cache in self.caches:
            cache.seen += 1
        return self.output

    def _check_room(self) -> None:
        for cache, state in zip(self.caches, self.states, strict=True):
            if cache.state is not state:
                raise ValueError("cache holds other tensors than were recorded; record a new graph")
            if cache.seen >= cache.capacity:
                raise ValueError(
                    f"cache has room for {cache.capacity} tokens and has seen {cache.seen}; make "
                    "it with a larger capacity, and record a new graph"
                )
