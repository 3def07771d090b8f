"""One training step as a CUDA graph: a narrow network's hundreds of kernels in one launch."""

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP_STEPS = 3  # cuDNN and the optimizer settle their buffers, as torch's notes on graphs advise


class StepGraph:
    """Replays a step on views of one shape; captures anew when the shape changes.

    The first steps of each shape run as they are, on a stream of their own; the next is captured,
    and from then on replayed on copies of the views. What the step reads besides its views (the
    learning rate) must sit in tensors on the device, and nothing in it may wait for the device.

    Args:
        step: views -> tensor of figures; updates the weights.
    """

    def __init__(self, step: Callable[[tuple[Tensor, ...]], Tensor]) -> None:
        self.step = step
        self.reset()

    def reset(self) -> None:
        """Forget what was captured, as after a change of anything the step depends on."""
        self._key: list | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._output: Tensor | None = None
        self._seen = 0

    def __call__(self, views: tuple[Tensor, ...], mode: bool) -> Tensor:
        """The step's figures, in memory of their own; a change of `mode` captures anew."""
        key = [mode, *(view.shape for view in views)]
        if key != self._key:
            self.reset()
            self._key = key
        if self._graph is None and self._seen < WARM_UP_STEPS:
            self._seen += 1
            stream, main = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                figures = self.step(views)
            main.wait_stream(stream)
            return figures
        if self._graph is None:
            self._inputs = tuple(torch.empty_like(view) for view in views)
            self._graph = torch.cuda.CUDAGraph()
            # records, does not run; a thread that reads ahead may pin memory meanwhile
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._output = self.step(self._inputs)
        for held, view in zip(self._inputs, views, strict=True):
            held.copy_(view)
        self._graph.replay()
        return self._output.clone()
