"""The step as a CUDA graph: against plain steps on a GPU; elsewhere, when it records, replays."""

from argparse import Namespace
from contextlib import contextmanager

import pytest
import torch

import main_GPQ
import main_SPQ
from args import gpq_parser, parse_args, spq_parser
from utils import cuda_graph
from utils.cuda_graph import WARM_UP_STEPS, StepGraph
from utils.distributed import Ranks
from utils.pretrained import start_model
from utils.setup import Run


class NoStream:
    def wait_stream(self, other):
        pass


class Recorder:
    """CUDA's graphs without a GPU: a step's work is recorded, and done again by replay, on the
    same memory."""

    def __init__(self):
        self.events, self.recording = [], None

    def do(self, work):
        """A kernel: it runs at once, or later and wherever it is replayed."""
        work() if self.recording is None else self.recording.append(work)


@pytest.fixture
def recorder(monkeypatch):
    found = Recorder()

    class Graph:
        def __init__(self):
            self.work = []

        def replay(self):
            found.events.append("replay")
            for work in self.work:
                work()

    @contextmanager
    def recording(graph, capture_error_mode):
        assert capture_error_mode == "thread_local"  # a thread may read ahead meanwhile
        found.events.append("record")
        found.recording = graph.work
        yield
        found.recording = None

    @contextmanager
    def stream(which):
        yield

    fake = Namespace(
        CUDAGraph=Graph, graph=recording, Stream=NoStream, current_stream=NoStream, stream=stream
    )
    monkeypatch.setattr(cuda_graph.torch, "cuda", fake)
    return found


def test_each_shape_and_mode_warms_up_and_is_recorded_once(recorder):
    def step(views):
        recorder.events.append("step")
        figures = torch.full((2,), torch.nan)

        def work():
            figures[0], figures[1] = views[0].sum(), views[1].mean()

        recorder.do(work)
        return figures

    graph = StepGraph(step)
    generator = torch.Generator().manual_seed(0)
    for side, mode in ((3, True), (4, True), (4, False)):
        recorder.events.clear()
        views = [torch.rand(2, 5, side, generator=generator) for _ in range(WARM_UP_STEPS + 3)]
        found = [graph(tuple(pair), mode) for pair in views]
        # recorded once, which does not run it, and replayed for that step and each one after it
        assert recorder.events == ["step"] * WARM_UP_STEPS + ["record", "step"] + 3 * ["replay"]
        # each step saw its own views, and no later one wrote over its figures
        for (a, b), figures in zip(views, found, strict=True):
            torch.testing.assert_close(figures, torch.stack([a.sum(), b.mean()]))


def test_labels_and_views_of_other_numbers_are_replayed_as_they_come(recorder):
    def step(views):
        view, labels, other = views
        figures = torch.full((3,), torch.nan)

        def work():
            figures[0] = view[torch.arange(4), labels].sum()
            figures[1], figures[2] = other.sum(), len(labels.unique())

        recorder.do(work)
        return figures

    graph = StepGraph(step)
    for rows in (6, 5):  # another number of unlabelled ones is another shape
        recorder.events.clear()
        for _ in range(WARM_UP_STEPS + 4):
            views = torch.rand(4, 3), torch.randint(0, 3, (4,)), torch.rand(rows, 2)
            want = [views[0][torch.arange(4), views[1]].sum(), views[2].sum()]
            want.append(torch.tensor(float(len(views[1].unique()))))
            torch.testing.assert_close(graph(views, True), torch.stack(want))
            assert views[1].dtype == torch.int64
        assert recorder.events == ["record", *4 * ["replay"]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_replayed_steps_of_gpq_train_as_plain_ones(tmp_path):
    """Labels, another number of unlabelled images, and a reversal that warms up."""
    words = ["--width=8", "--batch_size=16", "--N_books=4", "--L_word=4", "--epochs=6", "--amp=off"]
    words += ["--reversal_warmup_epochs=2", f"--output_dir={tmp_path}", "--lr=0.01"]
    found = []
    for graph in (False, True):
        args = parse_args(gpq_parser(), [*words, f"--cuda_graph={graph}"])
        torch.manual_seed(0)
        device = torch.device("cuda")
        images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, device=device)
        labels = torch.randint(0, 10, (52,), device=device)
        data = Namespace(labelled=(images[:52], labels), train=images[52:])
        run = Run("GPQ", args, device, Ranks(), checkpoint=None).with_flags(n_classes=10)
        trainer = main_GPQ.build_trainer(run, start_model(run), data, None)
        assert (trainer._graph is not None) == graph
        found.append([])
        for _ in range(trainer.total_steps):
            trainer.train_step()
            found[-1].append(trainer.read_losses())
    assert found[0][-1]["loss"] < found[0][0]["loss"] - 0.1
    for plain, replayed in zip(*found, strict=True):
        # cuDNN may sum in another order, and steps carry that on
        assert replayed == pytest.approx(plain, rel=1e-2, abs=1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("optimizer", ["adam", "muon", "sgd"])
def test_replayed_steps_train_as_plain_ones(optimizer, tmp_path):
    """The rate changes at every step, crops grow on the way, batch norm freezes near the end."""
    words = ["--width=8", "--batch_size=16", "--N_books=4", "--L_word=4", "--epochs=6", "--amp=off"]
    words += ["--early_crop_size=16", "--early_share=0.5", "--freeze_bn_epoch=5"]
    words += [f"--optimizer={optimizer}", f"--output_dir={tmp_path}", "--loss=cqc", "--lr=0.01"]
    losses = []
    for graph in (False, True):
        args = parse_args(spq_parser(), [*words, f"--cuda_graph={graph}"])
        torch.manual_seed(0)
        images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, device="cuda")
        run = Run("SPQ", args, images.device, Ranks(), checkpoint=None)
        trainer = main_SPQ.build_trainer(run, start_model(run), images, None)
        assert (trainer._graph is not None) == graph
        losses.append([])
        for _ in range(trainer.total_steps):
            trainer.train_step()
            losses[-1].append(trainer.read_losses()["loss"])
    assert losses[0][-1] < losses[0][0] - 0.1
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
