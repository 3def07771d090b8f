"""Command line: both ways of every boolean, released names and defaults, bad values."""

import pytest

from args import code_bits, parse_args, spq_parser


def parse(*argv):
    return parse_args(spq_parser(), argv)


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1  # one message, not a page of usage
    return message


def test_released_command_and_defaults():
    args = parse(
        "--gpu_id=0", "--batch_size=256", "--N_books=8", "--N_words=16", "--eval_epoch=100"
    )
    assert args.given == {"gpu_id", "batch_size", "N_books", "N_words", "eval_epoch"}
    assert vars(args) | {"given": frozenset()} == vars(parse())
    released = {
        "gpu_id": 0,
        "if_download": False,
        "batch_size": 256,
        "input_size": 32,
        "N_books": 8,
        "N_words": 16,
        "L_word": 16,
        "soft_quantization_scale": 5.0,
        "contrastive_temperature": 0.5,
        "num_cls": 10,
        "eval_epoch": 100,
        "Top_N": 1000,
        "lr": 3e-4,
        "weight_decay": 1e-5,
        "epochs": 2000,
        "width": 64,
    }
    for name, value in released.items():
        assert getattr(args, name) == value, name


BOOLEANS = [
    action.dest for action in spq_parser()._actions if type(action).__name__ == "BooleanFlag"
]


def test_there_are_booleans():
    assert {"if_download", "compile", "eval_only", "overwrite"} <= set(BOOLEANS)


@pytest.mark.parametrize("name", BOOLEANS)
def test_booleans_both_ways(name, capsys):
    more = ["--resume=auto"] if name == "eval_only" else []

    def value(*argv):
        return getattr(parse(*more, *argv), name)

    dashed = name.replace("_", "-")
    assert [value(f"--{name}"), value(f"--{name}=True"), value(f"--{name}=true")] == [True] * 3
    assert [value(f"--{name}=False"), value(f"--no-{name}"), value(f"--no-{dashed}")] == [False] * 3
    assert f"--{name}=maybe: must be True or False" in refused(capsys, f"--{name}=maybe")
    assert "takes no value" in refused(capsys, f"--no-{name}=True")


@pytest.mark.parametrize(
    ("argv", "bits"),
    [
        (["--N_books=4"], 16),
        (["--N_books=8"], 32),
        (["--N_books=16"], 64),
        (["--N_books=8", "--N_words=256"], 64),  # the released code's M * sqrt(K) says 128
        (["--N_books=8", "--N_words=2"], 8),
        (["--quantizer=vq", "--N_words=4096"], 12),
    ],
)
def test_code_bits(argv, bits):
    args = parse(*argv)
    assert code_bits(args) == bits
    assert args.output_dir.name == f"SPQ_cifar10_{bits}bits"


@pytest.mark.parametrize(
    ("flag", "value", "allowed"),
    [
        ("N_words", "12", "power of two"),
        ("N_words", "1", "power of two from 2"),
        ("N_words", "-4", "power of two from 2"),
        ("N_words", "131072", "to 65536"),
        ("N_words", "sixteen", "power of two"),
        ("N_books", "0", "at least 1"),
        ("batch_size", "-4", "at least 2"),
        ("batch_size", "2.5", "whole number"),
        ("lr", "-0.1", "above 0"),
        ("lr", "nan", "above 0"),
        ("lr", "inf", "finite number above 0"),
        ("weight_decay", "-1", "at least 0"),
        ("contrastive_temperature", "0", "above 0"),
        ("epochs", "0", "at least 1"),
        ("max_steps", "-1", "at least 1"),
        ("gpu_id", "-1", "at least 0"),
        ("seed", "-1", "at least 0"),
        ("input_size", "4", "at least 8"),
        ("limit_train", "0", "at least 1"),
        ("warmup_epochs", "3000", "at most --epochs"),
        ("loss", "triplet", "cqc-paper"),
        ("lr_schedule", "step", "released"),
        ("quantizer", "opq", "vq"),
        ("distance", "cosine", "squared_l2"),
        ("arch", "vgg", "resnet18"),
        ("amp", "yes", "bf16"),
    ],
)
def test_bad_values_name_flag_value_and_what_is_allowed(flag, value, allowed, capsys):
    message = refused(capsys, f"--{flag}={value}")
    assert f"--{flag}" in message
    assert value in message
    assert allowed in message


def test_unknown_and_shortened_flags_are_refused(capsys):
    assert "--N_book=8" in refused(capsys, "--N_book=8")
    assert "--frobnicate" in refused(capsys, "--frobnicate")


def test_contradictions_are_named(capsys):
    assert "--eval_only: needs --resume" in refused(capsys, "--eval_only")
    assert "--overwrite" in refused(capsys, "--overwrite", "--resume=auto")


def test_help_shows_every_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    page = capsys.readouterr().out
    for action in spq_parser()._actions:
        if action.dest != "help":
            assert f"--{action.dest}" in page
            assert action.help
            assert "default" in action.help or action.default is not None
    assert page.count("(default") >= len(spq_parser()._actions) - 1


def test_an_empty_resume_and_a_warm_up_without_effect_are_refused(capsys):
    assert "--resume=" in refused(capsys, "--resume=")
    message = refused(capsys, "--warmup_epochs=2", "--lr_schedule=released")
    assert "--warmup_epochs=2" in message
