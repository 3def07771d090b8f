"""Time our parts against plain ones, after asserting that both compute the same.

    python scripts/benchmark.py                    # everything, some minutes on two cores
    python scripts/benchmark.py --part=loss        # or several of loss,augmentation,step,evaluation

The plain versions are written as the released code works: float32, default memory layout, a
(2B, 2B, D) tensor of cosines in the loss, a Python loop over queries and codebooks in evaluation,
kornia's augmentation. Whole epochs, a profile of a step and its memory: benchmark_training.py.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.augment import BatchedAugment, Draw, SimCLRAugment
from data.batches import AHEAD
from losses import cqc_loss
from models import SPQ, build_quantizer, build_trunk
from utils.device import AMP_DTYPES, choose_amp, describe_hardware
from utils.metrics import evaluate_retrieval

Part = Callable[[argparse.Namespace, torch.device], dict]
TAU = 0.5
QUERIES, ITEMS, TOP_N = 10_000, 50_000, 1000
PLAIN_QUERIES = 200  # the plain evaluation is timed on these and scaled up
# kornia solves float32 systems for each crop's map, which moves its points by some 1e-6 of the
# image's side: on noise of 32 pixels crops differ by up to 1e-5, after the jitter by 3e-5
SAME_VIEW = 1e-4


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of `work` after one call to warm up."""
    times = []
    for i in range(repeats + 1):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        if i:
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def wait(device: torch.device) -> None:
    """Until all work given to a GPU is done."""
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


def draw_of_kornia(augment: SimCLRAugment, device: torch.device | str = "cpu") -> Draw:
    """What kornia's transforms drew in their last call, as parameters of the batched pass."""
    crop, flip, jitter, gray, blur = (transform._params for transform in augment.transforms)

    def chosen(params: dict[str, Tensor]) -> Tensor:  # the images a transform was applied to
        return params["batch_prob"].flatten() > 0.5

    def factors(params: dict[str, Tensor], name: str, neutral: float) -> Tensor:
        on, values = chosen(params), params[name].float().flatten()
        if len(values) == len(on):
            return torch.where(on, values, neutral)
        return torch.full(on.shape, neutral).masked_scatter(on, values)  # drawn for those alone

    corners = crop["src"].float()  # (B, 4, 2): x, y clockwise from the top left
    left, top = corners[:, 0].unbind(1)
    right, bottom = corners[:, 2].unbind(1)
    names = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
    # a neighbour's weight, that of the centre being 1: none for a sigma of (almost) nothing
    weight = torch.exp(-0.5 / factors(blur, "sigma", 1e-6).square())
    return Draw(
        top.to(device),
        left.to(device),
        (bottom - top + 1).to(device),
        (right - left + 1).to(device),
        flip=chosen(flip).float().to(device),
        jitter=tuple(factors(jitter, f"{k}_factor", v).to(device) for k, v in names.items()),
        order=tuple(jitter["order"].tolist()),
        gray=chosen(gray).float().to(device),
        side=(weight / (1 + 2 * weight)).to(device),
    )


def bench_augmentation(args: argparse.Namespace, device: torch.device) -> dict:
    """Both views of a batch; `share_of_step` sets them against the step of the network.

    The batched pass takes as many batches at once as main_SPQ.py gives it; its time is that of
    one batch.
    """
    at_once = AHEAD if device.type == "cuda" else 1
    shape = (at_once * args.batch_size, 3, 32, 32)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    batch = images[: args.batch_size]
    kornia, batched = SimCLRAugment(32).to(device), BatchedAugment(32)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # kornia blurs by convolution
        want = kornia(batch)
    difference = (
        (batched.transform(batch, draw_of_kornia(kornia, device)) - want).abs().max().item()
    )
    assert difference <= SAME_VIEW, difference
    repeats = max(5, args.repeats)
    t_kornia = seconds(lambda: (kornia(batch), kornia(batch)), device, repeats)
    t_batched = seconds(lambda: (batched(images), batched(images)), device, repeats) / at_once
    return {
        "kornia_s": t_kornia,
        "batched_s": t_batched,
        "ratio": t_kornia / t_batched,
        "batches_at_once": at_once,
        "batched_images_per_s": args.batch_size / t_batched,
        "largest_difference": difference,
        "equality": f"same images from kornia's parameters, within {SAME_VIEW:g}",
    }


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


PARTS: dict[str, Part] = {
    "loss": bench_loss,
    "augmentation": bench_augmentation,
    "step": bench_step,
    "evaluation": bench_evaluation,
}


# --- command line, of benchmark_training.py too -------------------------------------------------


def some_of(names: Iterable[str]) -> Callable[[str], str]:
    """A flag's type: `all`, or some of these names with commas between them."""
    names = list(names)

    def parse(words: str) -> str:
        chosen = names if words == "all" else words.split(",")
        for name in chosen:
            if name not in names:
                raise argparse.ArgumentTypeError(f"{name!r}: allowed are all, {', '.join(names)}")
        return ",".join(chosen)

    return parse


def add_flags(parser: argparse.ArgumentParser, parts: dict[str, Part]) -> None:
    """What both benchmarks take."""
    flag = parser.add_argument
    some = ",".join(parts)
    flag("--part", type=some_of(parts), default="all", help=f"all (default), or some of {some}")
    flag("--width", type=int, default=64, help="of the trunk (default: 64)")
    flag("--batch_size", type=int, default=256, help="images (default: 256)")
    flag("--amp", choices=["auto", "bf16", "off"], default="auto", help="of our step")


def run_parts(args: argparse.Namespace, parts: dict[str, Part], script: str) -> dict:
    """Hardware, versions and the figures of each part asked for, by its name.

    Several parts get a process each: peak memory is a process's. One that fails leaves an
    `error` in its place.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {
        "hardware": describe_hardware(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    names = args.part.split(",")
    if len(names) == 1:
        return found | {args.part: parts[args.part](args, device)}
    for name in names:
        print(f"{name} ...", file=sys.stderr)
        found[name] = in_own_process(args, name, script)
    return found


def in_own_process(args: argparse.Namespace, part: str, script: str, **changed: object) -> dict:
    """The figures of one part, run with the same flags but for those changed."""
    flags = vars(args) | {"part": part} | changed
    words = [f"--{name}={value}" for name, value in flags.items()]
    done = subprocess.run(
        [sys.executable, script, *words], stdout=subprocess.PIPE, text=True, check=False
    )
    try:  # a part of which something failed has figures nevertheless
        return json.loads(done.stdout)[part]
    except (ValueError, KeyError):
        return {"error": f"exit code {done.returncode}"}


def print_found(found: dict) -> None:
    """One JSON object; exits with code 1 if a part failed."""
    print(json.dumps(found, indent=2))
    sys.exit(int(any("error" in part for part in found.values() if isinstance(part, dict))))


def main() -> None:
    """Run the parts asked for and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser, PARTS)
    parser.add_argument("--repeats", type=int, default=3, help="timed calls; their median counts")
    found = run_parts(parser.parse_args(), PARTS, __file__)
    step, augmentation = found.get("step", {}), found.get("augmentation", {})
    if "ours_s" in step and "kornia_s" in augmentation:
        augmentation["share_of_step"] = {
            name: augmentation[f"{name}_s"] / step["ours_s"] for name in ("kornia", "batched")
        }
    print_found(found)


if __name__ == "__main__":
    main()
