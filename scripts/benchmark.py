"""Time our parts against plain ones, after asserting that both compute the same.

    python scripts/benchmark.py                    # everything, some minutes on two cores
    python scripts/benchmark.py --part loss        # one of: loss, augmentation, step, evaluation

The plain versions are written as the released code works: float32, default memory layout, a
(2B, 2B, D) tensor of cosines in the loss, a Python loop over queries and codebooks in evaluation.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.augment import SimCLRAugment
from losses import cqc_loss
from models import SPQ, build_quantizer, build_trunk
from utils.device import AMP_DTYPES, choose_amp, describe_hardware
from utils.metrics import evaluate_retrieval

TAU = 0.5
QUERIES, ITEMS, TOP_N = 10_000, 50_000, 1000
PLAIN_QUERIES = 200  # the plain evaluation is timed on these and scaled up


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of `work` after one call to warm up."""
    times = []
    for i in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        if i:
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- plain versions -----------------------------------------------------------------------------


def plain_nt_xent(u: Tensor, v: Tensor, tau: float) -> Tensor:
    """NT-Xent with every pair's cosine taken from a (2B, 2B, D) broadcast."""
    rows = torch.cat([u, v])
    B = len(u)
    sim = F.cosine_similarity(rows[:, None, :], rows[None, :, :], dim=2)
    positives = torch.cat([torch.diag(sim, B), torch.diag(sim, -B)])[:, None]
    mask = torch.eye(2 * B, dtype=torch.bool, device=u.device)
    mask |= mask.roll(B, 1)
    negatives = sim[~mask].view(2 * B, -1)
    logits = torch.cat([positives, negatives], dim=1) / tau
    return F.cross_entropy(logits, torch.zeros(2 * B, dtype=torch.long, device=u.device))


def plain_loss(x_a: Tensor, x_b: Tensor, z_a: Tensor, z_b: Tensor) -> Tensor:
    """The released loss as released."""
    return plain_nt_xent(x_a, z_b, TAU) + plain_nt_xent(x_b, z_a, TAU)


def plain_evaluation(
    query: Tensor, ql: Tensor, codes: Tensor, dl: Tensor, codebooks: Tensor
) -> float:
    """mAP@1000 by a loop over queries and codebooks (squared L2)."""
    M, _, d = codebooks.shape
    total = 0.0
    for q in range(len(query)):
        dist = torch.zeros(len(codes), device=query.device)
        for m in range(M):
            lut = (query[q, m * d : (m + 1) * d] - codebooks[m]).square().sum(-1)
            dist += lut[codes[:, m]]
        order = torch.sort(dist, stable=True).indices[:TOP_N]
        rel = (dl[order] == ql[q]).float()
        if rel.sum() > 0:
            precision = rel.cumsum(0) / torch.arange(1, TOP_N + 1, device=query.device)
            total += ((precision * rel).sum() / rel.sum()).item()
    return total / len(query)


# --- parts --------------------------------------------------------------------------------------


def bench_loss(args: argparse.Namespace, device: torch.device) -> dict:
    """Loss, forward and backward."""

    def make() -> list[Tensor]:
        torch.manual_seed(0)
        shape = (args.batch_size, 128)
        return [torch.randn(shape, device=device, requires_grad=True) for _ in range(4)]

    ours, plain = make(), make()
    one, two = cqc_loss(*ours, TAU), plain_loss(*plain)
    one.backward(), two.backward()
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6)
    t_plain = seconds(lambda: plain_loss(*plain).backward(), device, args.repeats)
    t_ours = seconds(lambda: cqc_loss(*ours, TAU).backward(), device, args.repeats)
    return {
        "plain_s": t_plain,
        "ours_s": t_ours,
        "ratio": t_plain / t_ours,
        "equality": "loss within 1e-5, gradients within 1e-3",
    }


def build(args: argparse.Namespace, device: torch.device) -> SPQ:
    """32-bit SPQ of the given width, always with the same weights."""
    torch.manual_seed(0)
    return SPQ(build_trunk("resnet18", args.width), build_quantizer("soft", 8, 16, 16)).to(device)


def bench_step(args: argparse.Namespace, device: torch.device) -> dict:
    """One training step on given views: forward of both, loss, backward, Adam.

    Ours has what the Trainer does beside: fused Adam and the norm of the gradients.
    """
    amp = choose_amp(args.amp, device)
    dtype = AMP_DTYPES[amp]
    torch.manual_seed(1)
    views = [torch.rand(args.batch_size, 3, 32, 32, device=device) for _ in range(2)]
    plain = Stepper(build(args, device), views, plain_loss)
    layout = torch.channels_last if args.width % 8 == 0 else torch.contiguous_format
    model = build(args, device).to(memory_format=layout)
    ours = Stepper(model, views, lambda *v: cqc_loss(*v, TAU), dtype, ours=True)
    # Same weights, same views, before any update. The loss alone would not do: at the start it
    # hardly depends on the images. bf16 has 8 bits of mantissa, and 20 layers add up.
    found, want = ours.outputs(), plain.outputs()
    tolerance = {"loss": 2e-4, "descriptors": 1e-3, "gradients": 1e-2}
    if dtype is not None:
        tolerance = {"loss": 2e-2, "descriptors": 5e-2, "gradients": 0.3}
    error = {k: ((found[k] - want[k]).norm() / want[k].norm()).item() for k in want}
    assert all(error[name] <= tolerance[name] for name in error), (error, tolerance)
    t_plain = seconds(plain.step, device, args.repeats)
    t_ours = seconds(ours.step, device, args.repeats)
    return {
        "width": args.width,
        "batch": args.batch_size,
        "amp": amp,
        "plain_s": t_plain,
        "ours_s": t_ours,
        "ratio": t_plain / t_ours,
        "ours_images_per_s": args.batch_size / t_ours,
        "relative_difference": error,
        "tolerance": tolerance,
    }


class Stepper:
    """A training step over and over on the same two views."""

    def __init__(
        self,
        model: nn.Module,
        views: list[Tensor],
        loss_of: Callable[..., Tensor],
        dtype: torch.dtype | None = None,
        ours: bool = False,
    ) -> None:
        self.model, self.views, self.loss_of = model, views, loss_of
        self.dtype, self.ours = dtype, ours
        self.optimizer = torch.optim.Adam(model.parameters(), lr=3e-4, fused=ours or None)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Loss and descriptors, the gradients in place."""
        with torch.autocast(self.views[0].device.type, self.dtype, self.dtype is not None):
            x_a, z_a = self.model(self.views[0])
            x_b, z_b = self.model(self.views[1])
        loss = self.loss_of(x_a, x_b, z_a, z_b)
        self.optimizer.zero_grad()
        loss.backward()
        return loss.detach(), x_a.detach()

    def outputs(self) -> dict[str, Tensor]:
        """What two implementations are compared by."""
        loss, x = self.gradients()
        grads = torch.cat([p.grad.flatten() for p in self.model.parameters()])
        return {"loss": loss, "descriptors": x, "gradients": grads}

    def step(self) -> float:
        """One optimisation step."""
        loss, _ = self.gradients()
        if self.ours:
            grads = [p.grad for p in self.model.parameters()]
            torch.nn.utils.get_total_norm(grads).item()
        self.optimizer.step()
        return loss.item()


def bench_augmentation(args: argparse.Namespace, device: torch.device) -> dict:
    """Both views of a batch; `share_of_step` sets it against the step of the network."""
    images = torch.randint(0, 256, (args.batch_size, 3, 32, 32), dtype=torch.uint8, device=device)
    augment = SimCLRAugment(32).to(device)
    t = seconds(lambda: (augment(images), augment(images)), device, max(5, args.repeats))
    return {"two_views_s": t, "images_per_s": args.batch_size / t}


def bench_evaluation(args: argparse.Namespace, device: torch.device) -> dict:
    """mAP@1000 and the whole ranking of 10,000 queries against 50,000 items, M = 8, K = 16."""
    torch.manual_seed(0)
    M, K, d = 8, 16, 16
    codebooks = 0.3 * torch.randn(M, K, d, device=device)
    labels = [torch.randint(0, 10, (n,), device=device) for n in (QUERIES, ITEMS)]
    codes = torch.randint(0, K, (ITEMS, M), device=device)
    query = 0.3 * torch.randn(QUERIES, M * d, device=device)

    def ours(n: int, whole: bool) -> dict:
        return evaluate_retrieval(
            query[:n], labels[0][:n], codes, labels[1], codebooks, top_n=TOP_N, whole_ranking=whole
        )

    def plain() -> float:
        return plain_evaluation(
            query[:PLAIN_QUERIES], labels[0][:PLAIN_QUERIES], codes, labels[1], codebooks
        )

    one, two = ours(PLAIN_QUERIES, False)[f"mAP@{TOP_N}"], plain()
    # the two add the tables in another order: near-ties may swap
    assert abs(one - two) < 1e-5, (one, two)
    t_plain = seconds(plain, device, 1) * QUERIES / PLAIN_QUERIES
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    t_head = seconds(lambda: ours(QUERIES, False), device, args.repeats)
    t_whole = seconds(lambda: ours(QUERIES, True), device, args.repeats)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {
        "plain_s_scaled_up": t_plain,
        "ours_mAP@1000_s": t_head,
        "ratio": t_plain / t_head,
        "ours_whole_ranking_s": t_whole,
        "extra_memory_MiB": peak,
        "equality": f"mAP@1000 of {PLAIN_QUERIES} queries: {one:.7f} and {two:.7f}",
    }


PARTS = {
    "loss": bench_loss,
    "augmentation": bench_augmentation,
    "step": bench_step,
    "evaluation": bench_evaluation,
}


def main() -> None:
    """Run the parts asked for and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--width", type=int, default=64, help="of the trunk (default: 64)")
    parser.add_argument("--batch_size", type=int, default=256, help="images (default: 256)")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls; their median counts")
    parser.add_argument(
        "--amp", choices=["auto", "bf16", "off"], default="auto", help="of our step (default: auto)"
    )
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {
        "hardware": describe_hardware(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if args.part == "all":  # each in a process of its own: peak memory is a process's
        flags = ("width", "batch_size", "repeats", "amp")
        passed_on = [f"--{name}={getattr(args, name)}" for name in flags]
        for name in PARTS:
            print(f"{name} ...", file=sys.stderr)
            command = [sys.executable, __file__, f"--part={name}", *passed_on]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[name] = json.loads(done.stdout)[name]
    else:
        found[args.part] = PARTS[args.part](args, device)
    if "step" in found and "augmentation" in found:
        share = found["augmentation"]["two_views_s"] / found["step"]["ours_s"]
        found["augmentation"]["share_of_step"] = share
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
