"""Shell scripts hand the main scripts flags that these take."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from args import PARSERS, SSP_METHODS, code_bits, parse_args

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def recorded_words(tmp_path):
    """A stand-in for the environment's Python that records what it is called with."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    program = venv / "bin" / "python"
    program.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    program.chmod(0o755)
    shutil.copy(ROOT / "requirements.txt", venv / "requirements.installed")

    def call(script, *flags):
        done = subprocess.run(
            ["bash", f"scripts/{script}", *flags],
            cwd=ROOT,
            env=os.environ | {"VENV": str(venv)},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.split("\n")[:-1]

    return call


@pytest.fixture
def recorded(recorded_words):
    """The flags that a script gives to its main script."""

    def call(script, *flags):
        words = recorded_words(script, *flags)
        method = words[0].removeprefix("main_").removesuffix(".py")
        last = words.index("scripts/baselines.py") if "scripts/baselines.py" in words else None
        return parse_args(PARSERS[method](), words[1:last])

    return call


@pytest.mark.parametrize("method", [None, *SSP_METHODS])
def test_each_method_of_ssp_sees_as_many_images(recorded_words, method):
    words = recorded_words("ssp_cifar10.sh", *filter(None, [method]), "--seed=3")
    args = parse_args(PARSERS["SSP"](), words[words.index("main_SSP.py") + 1 :])
    method = method or "ssp"
    assert (args.method, args.seed, args.eval_before) == (method, 3, True)
    assert ("make_anchors.py" in words) == (args.anchors is not None) == (method == "ssp")
    images = args.tuples * (2 + args.negatives) if method == "aml" else 54_000
    assert abs(images - 54_000) < 3_000
    assert abs(args.batch_size * (2 + args.negatives if method == "aml" else 1) - 256) < 30


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_training_scripts_give_the_papers_bits_and_the_released_settings(recorded, bits):
    args = recorded(f"train_cifar10_{bits}bits.sh")
    assert code_bits(args) == bits
    assert (args.N_words, args.L_word, args.width, args.batch_size) == (16, 16, 64, 256)
    assert (args.lr, args.contrastive_temperature, args.epochs) == (3e-4, 0.5, 2000)
    assert args.resume == "auto"


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("name", ["flickr25k", "nuswide"])
def test_the_papers_other_sets_have_their_size_trunk_and_top_n(recorded, name, bits):
    args = recorded(f"train_{name}_{bits}bits.sh", "--data_dir=elsewhere")
    assert code_bits(args) == bits
    assert (args.dataset, args.data_dir, args.input_size) == (name, Path("elsewhere"), 64)
    assert (args.arch, args.Top_N, args.N_words, args.L_word) == ("resnet50", 5000, 16, 16)
    assert (args.output_dir, args.resume) == (Path(f"runs/SPQ_{name}_{bits}bits"), "auto")


@pytest.mark.parametrize(
    ("name", "flag", "value"),
    [
        ("c", "loss", "contrastive"),
        ("h", "quantizer", "hard"),
        ("q", "quantizer", "vq"),
        ("s", "pretrained", True),
    ],
)
def test_each_ablation_changes_its_one_thing(recorded, name, flag, value):
    args = recorded(f"ablation_spq_{name}.sh")
    method = recorded("train_cifar10_32bits.sh")
    assert getattr(args, flag) == value
    allowed = {flag, "output_dir"} | ({"N_words"} if name == "q" else set())
    changed = {k for k in vars(args) if getattr(args, k) != getattr(method, k)}
    assert changed - {"given"} == allowed


@pytest.mark.parametrize(("bits", "M"), [(12, 3), (24, 6), (32, 8), (48, 12)])
def test_gpq_s_scripts_give_the_papers_bits_and_settings(recorded, bits, M):
    args = recorded(f"train_gpq_cifar10_{bits}bits.sh", "--width=16")
    assert (code_bits(args), args.N_books, args.N_words, args.L_word) == (bits, M, 16, 12)
    assert (args.arch, args.width, args.protocol, args.Top_N) == ("cifar_vgg", 16, "gpq", "all")
    assert (args.batch_size, args.epochs, args.optimizer, args.beta1) == (500, 300, "adam", 0.5)
    assert (args.lr, args.lr_schedule, args.weight_decay) == (2e-4, "staircase", 0.0)
    assert (args.recipe, args.augmentation) == ("paper", "crop-flip")
    assert (args.soft_quantization_scale, args.classification_scale) == (20.0, 4.0)
    assert (args.n_pair_weight, args.entropy_weight, args.classification_weight) == (1.0, 0.1, 0.1)
    assert (args.reversal_weight, args.reversal_warmup_epochs) == (1.0, 0.0)
    assert args.output_dir == Path(f"runs/GPQ_cifar10_{bits}bits")
    assert args.resume == "auto"


@pytest.mark.parametrize("term", ["n_pair", "entropy", "classification"])
def test_each_ablation_of_gpq_takes_one_term_away(recorded, term):
    args = recorded(f"ablation_gpq_no_{term}.sh")
    method = recorded("train_gpq_cifar10_48bits.sh")
    assert getattr(args, f"{term}_weight") == 0
    changed = {k for k in vars(args) if getattr(args, k) != getattr(method, k)}
    assert changed - {"given"} == {f"{term}_weight", "output_dir"}


def test_gpq_s_baseline_is_trained_by_the_labels_alone(recorded):
    args = recorded("baseline_gpq.sh")
    weights = (args.n_pair_weight, args.entropy_weight, args.classification_weight)
    assert weights == (0, 0, 1)
    assert code_bits(args) == 48


def test_quickstart_trains_a_narrow_network_at_32_bits(recorded):
    args = recorded("quickstart.sh", "--epochs=1")
    assert code_bits(args) == 32
    assert args.if_download
    assert args.width == 16
    assert args.recipe == "fast"
    assert args.epochs == 1  # later flags win
    assert args.resume == "auto"


def test_an_environment_cut_off_half_way_is_made_anew(tmp_path):
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "pyvenv.cfg").write_text("")
    (venv / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    (venv / "bin" / "python").chmod(0o755)
    # without an index the packages that come next cannot be fetched: the call ends there
    done = subprocess.run(
        ["bash", "-c", "source scripts/setup.sh"],
        cwd=ROOT,
        env=os.environ | {"VENV": str(venv), "PIP_NO_INDEX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "making it anew" in done.stdout
    assert (venv / "bin" / "pip").exists()


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    done = subprocess.run(
        ["bash", "scripts/quickstart.sh"],
        cwd=ROOT,
        env=os.environ | {"VENV": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "is no virtual environment" in done.stderr
    assert (tmp_path / "mine.txt").exists()


def test_a_python_that_was_asked_for_is_not_replaced(tmp_path):
    done = subprocess.run(
        ["bash", "scripts/quickstart.sh"],
        cwd=ROOT,
        env=os.environ | {"VENV": str(tmp_path / "venv"), "PYTHON": "/no/such/python"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "PYTHON=/no/such/python" in done.stderr


def test_setup_names_the_fix_when_there_is_no_python(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("dirname", "cat"):
        (tools / name).symlink_to(shutil.which(name))
    done = subprocess.run(
        [shutil.which("bash"), "scripts/quickstart.sh"],
        cwd=ROOT,
        env={"PATH": str(tools), "VENV": str(tmp_path / "venv")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "no Python 3.10 to 3.12 found" in done.stderr
