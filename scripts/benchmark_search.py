"""Time search engines side by side, after checking how far their rankings agree.

    python scripts/benchmark_search.py                          # 10^6 codes of 32 bits
    python scripts/benchmark_search.py --items=10000000 --codes=clustered --engines=default,ivfpq

Engines take turns, round by round, so that a machine whose speed drifts favours none. Times are
medians over the rounds; memory is what a process of its own needs for the engine and one search,
beyond the packed codes that it is given.
"""

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentTypeError, Namespace
from pathlib import Path
from typing import Protocol

import faiss
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from args import count, positive_int
from data.cifar10 import load_cifar10
from utils.cli import run_main
from utils.device import describe_hardware
from utils.errors import UserError
from utils.evaluation import describe_images, encode_images
from utils.flags import HelpFormatter, Parser
from utils.retrieval import lookup_tables
from utils.search.engines import FaissEngine, Lists, OwnEngine, decode, export
from utils.search.packing import pack_codes, unpack_codes
from utils.trained import load_trained

ROOT = Path(__file__).resolve().parent.parent
ENGINES = ("own", "indexpq", "default", "fastscan", "ivfpq")  # `default` is search.py's
EXACT = ("own", "indexpq", "default")
CLUSTERS, CHANGED = 10_000, 0.3  # of clustered codes: centres, share of words drawn anew
TOLERANCE = 1e-4  # relative; distances within it are a tie


class Engine(Protocol):
    """What is timed."""

    def search(self, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """dist (Q, k) ascending and index (Q, k)."""


def build(name: str, packed: np.ndarray, codebooks: np.ndarray, nlist: int | None) -> Engine:
    """The engine called `name`."""
    if name == "own":
        return OwnEngine(packed, codebooks, "squared_l2")
    if name == "default":
        return FaissEngine(packed, codebooks)
    kind = "faiss" if name == "indexpq" else f"faiss-{name}"
    return export(packed, codebooks, kind, Lists(nlist))


class Probing:
    """An IVF index that looks into `nprobe` of its lists; several of them share one index."""

    def __init__(self, index: faiss.IndexIVF, nprobe: int) -> None:
        self.index, self.nprobe = index, min(nprobe, index.nlist)

    def search(self, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """dist (Q, k) ascending and index (Q, k)."""
        self.index.nprobe = self.nprobe
        return self.index.search(query, k)


def make_codes(args: Namespace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packed codes (N, code_bytes), codebooks (M, K, d) of --checkpoint, queries (Q, D).

    uniform: every word equally likely. clustered: CLUSTERS random codes, of which each item has
    CHANGED of the words drawn anew. cifar10: the codes of the 50,000 training images, the test
    images as queries. Queries of made codes are decoded items with Gaussian noise of half the
    words' own standard deviation.
    """
    trained = load_trained(args.checkpoint)
    codebooks = trained.model.quantizer.codebooks.detach().numpy()
    M, K, _ = codebooks.shape
    if args.codes == "cifar10":
        train, test = load_cifar10(args.data_dir)
        size = trained.input_size
        codes = encode_images(trained.model, train.images[: args.items], size)
        query = describe_images(trained.model, test.images[: args.queries], size)
        return pack_codes(codes.numpy(), K), codebooks, query.numpy()
    rng = np.random.default_rng(args.seed)
    codes = rng.integers(0, K, (args.items, M), dtype=np.uint16)
    if args.codes == "clustered":
        centres = rng.integers(0, K, (CLUSTERS, M), dtype=np.uint16)
        kept = rng.random((args.items, M), dtype=np.float32) >= CHANGED
        np.copyto(codes, centres[rng.integers(0, CLUSTERS, args.items)], where=kept)
    packed = pack_codes(codes, K)
    query = decode(packed[rng.integers(0, args.items, args.queries)], codebooks)
    noise = rng.normal(0, codebooks.std() / 2, query.shape)
    return packed, codebooks, (query + noise).astype(np.float32)


# --- what is measured ---------------------------------------------------------------------------


def agreement(
    query: np.ndarray,
    packed: np.ndarray,
    codebooks: np.ndarray,
    reference: tuple[np.ndarray, np.ndarray],
    found: tuple[np.ndarray, np.ndarray],
) -> dict[str, float]:
    """How far a ranking is the exact one.

    Returns:
        `overlap`: mean share of the k nearest that were found; an item at the distance of the k-th
        counts, whichever of those in the tie it is. `distance_error`: largest difference between
        the distances told and the exact ones of the same items, relative to the k-th.
    """
    M, K, _ = codebooks.shape
    lut = lookup_tables(torch.from_numpy(query), torch.from_numpy(codebooks)).numpy()
    last = reference[0][:, -1:]
    overlap, error = [], 0.0
    for q, (dist, index) in enumerate(zip(*found, strict=True)):
        codes = unpack_codes(np.ascontiguousarray(packed[index[index >= 0]]), M, K)
        own = lut[q, np.arange(M), codes].sum(axis=1)
        overlap.append((own <= last[q] * (1 + TOLERANCE)).sum() / len(index))
        error = max(error, float(np.abs(own - dist[index >= 0]).max() / last[q, 0]))
    return {"overlap": float(np.mean(overlap)), "distance_error": error}


def memory_of(name: str, args: Namespace, files: Path) -> dict[str, float]:
    """MiB that a process of its own needs for an engine and a search; seconds to build it."""
    words = [sys.executable, __file__, f"--memory_of={name}", f"--files={files}"]
    words += [f"--k={args.k}", f"--threads={args.threads}"]
    words += [f"--nlist={args.nlist}"] if args.nlist else []
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-500:]}")
    return json.loads(done.stdout)


def measure_memory(args: Namespace) -> None:
    """The process that `memory_of` starts."""
    packed = np.load(args.files / "packed.npy")
    codebooks = np.load(args.files / "codebooks.npy")
    query = np.load(args.files / "query.npy")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far was of imports
    before = _kib("VmRSS")
    start = time.perf_counter()
    engine = build(args.memory_of, packed, codebooks, args.nlist)
    seconds = time.perf_counter() - start
    for k in args.k_list:
        engine.search(query, k)
    told = {"memory_mib": (_kib("VmHWM") - before) / 1024, "build_s": seconds}
    print(json.dumps(told))


def _kib(name: str) -> int:
    """Memory of this process, as Linux tells it: VmRSS is what it has, VmHWM the most it had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def measure(args: Namespace) -> dict:
    """All figures of all engines."""
    packed, codebooks, query = make_codes(args)
    N = len(packed)
    print(f"{N} codes of {8 * packed.shape[1]} bits, {len(query)} queries", file=sys.stderr)
    result: dict = {
        "hardware": describe_hardware(torch.device("cpu")),
        "threads": args.threads,
        "versions": {"python": platform.python_version(), "faiss": faiss.__version__},
        "codes": args.codes,
        "items": N,
        "code_bytes": packed.shape[1],
        "queries": len(query),
        "rounds": args.rounds,
        "engines": {},
    }
    figures, needs = result["engines"], {}
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder)
        arrays = {"packed": packed, "codebooks": codebooks, "query": query}
        for name, array in arrays.items():
            np.save(files / f"{name}.npy", array)
        for name in args.engine_list:
            print(f"memory of {name} ...", file=sys.stderr)
            needs[name] = memory_of(name, args, files)
    engines = {}
    for name in args.engine_list:
        print(f"building {name} ...", file=sys.stderr)
        engine = build(name, packed, codebooks, args.nlist)
        if name == "ivfpq":
            result["nlist"] = engine.nlist
            for nprobe in args.nprobe_list:
                engines[f"ivfpq, nprobe {nprobe}"] = Probing(engine, nprobe)
                figures[f"ivfpq, nprobe {nprobe}"] = dict(needs[name])
        else:
            engines[name], figures[name] = engine, needs[name]
    reference = engines.get("default") or build("default", packed, codebooks, None)
    for k in args.k_list:
        exact = reference.search(query, k)
        times: dict = {name: {"one": [], "many": []} for name in engines}
        for round_ in range(args.rounds + 1):
            print(f"k = {k}, round {round_} of {args.rounds}", file=sys.stderr)
            for name, engine in engines.items():
                start = time.perf_counter()
                found = engine.search(query, k)
                many = time.perf_counter() - start
                singles = query[: args.singles]
                start = time.perf_counter()
                for row in range(len(singles)):
                    engine.search(singles[row : row + 1], k)
                one = time.perf_counter() - start
                if round_ == 0:  # to warm up, and to compare
                    told = agreement(query, packed, codebooks, exact, found)
                    if name in EXACT and (told["overlap"] < 1 or told["distance_error"] > 1e-4):
                        raise RuntimeError(f"{name} does not rank exactly: {told}")
                    figures[name][f"k{k}"] = told
                else:
                    times[name]["many"].append(many / len(query))
                    times[name]["one"].append(one / len(singles))
        for name, found_times in times.items():
            figures[name][f"k{k}"] |= {
                "queries_per_s": 1 / statistics.median(found_times["many"]),
                "ms_alone": 1000 * statistics.median(found_times["one"]),
            }
    return result


def table(result: dict, k_list: list[int]) -> str:
    """The figures as Markdown."""
    lines = ["| engine | memory, MiB | build, s |", "|---|---|---|"]
    for k in k_list:
        lines[0] += f" k = {k}: queries/s | one alone, ms | overlap |"
        lines[1] += "---|---|---|"
    for name, row in result["engines"].items():
        line = f"| {name} | {row['memory_mib']:.0f} | {row['build_s']:.2f} |"
        for k in k_list:
            at = row[f"k{k}"]
            line += f" {at['queries_per_s']:.0f} | {at['ms_alone']:.1f} | {at['overlap']:.4f} |"
        lines.append(line)
    return "\n".join(lines)


def parser() -> Parser:
    """Flags."""
    parser = Parser(description=__doc__.split("\n")[0], formatter_class=HelpFormatter)
    flag = parser.add_argument
    flag("--items", type=positive_int, default=1_000_000, metavar="N", help="codes")
    flag("--queries", type=positive_int, default=500, metavar="N", help="asked together")
    flag("--singles", type=positive_int, default=20, metavar="N", help="asked one by one")
    flag("--k", default="10,1000", metavar="N,N", help="neighbours wanted")
    flag("--codes", choices=("uniform", "clustered", "cifar10"), default="uniform", help="of what")
    flag("--engines", default="own,indexpq,default,fastscan", metavar="NAME,NAME", help="timed")
    flag("--nlist", type=positive_int, default=None, metavar="N", help="lists of ivfpq")
    flag("--nprobe", default="16", metavar="N,N", help="lists ivfpq looks into, each timed")
    flag("--rounds", type=positive_int, default=5, metavar="N", help="turns of each engine")
    flag("--threads", type=positive_int, default=torch.get_num_threads(), metavar="N", help="used")
    flag("--seed", type=count, default=0, metavar="N", help="of made codes")
    flag(
        "--checkpoint",
        type=Path,
        default=ROOT / "results" / "cpu15min_32bits",
        metavar="RUN",
        help="whose codebooks are used",
    )
    flag("--data_dir", type=Path, default=Path("datasets"), metavar="DIR", help="CIFAR-10")
    flag("--output", type=Path, default=None, metavar="FILE", help="also write JSON there")
    flag("--memory_of", choices=ENGINES, default=None, metavar="NAME", help="used by itself")
    flag("--files", type=Path, default=None, metavar="DIR", help="used by itself")
    return parser


def _numbers(flag: str, text: str) -> list[int]:
    try:
        return [positive_int(word) for word in text.split(",")]
    except ArgumentTypeError as error:
        raise UserError(f"{flag}={text}: {error}") from error


def main() -> None:
    """Measure and print."""
    args = parser().parse_args()
    args.engine_list = args.engines.split(",")
    unknown = sorted(set(args.engine_list) - set(ENGINES))
    if unknown:
        raise UserError(f"--engines={args.engines}: allowed are {', '.join(ENGINES)}")
    args.k_list = _numbers("--k", args.k)
    args.nprobe_list = _numbers("--nprobe", args.nprobe)
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    if args.memory_of:
        measure_memory(args)
        return
    result = measure(args)
    print(table(result, args.k_list))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
