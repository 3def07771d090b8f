"""Command line: both ways of every boolean, released names and defaults, bad values."""

import pytest

from args import code_bits, parse_args, spq_parser
from utils.recipes import RECIPES


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
        "num_cls": None,  # the released 10, counted from the labels
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
    more = {"eval_only": ["--resume=auto"], "freeze_trunk": ["--weights=x.pth"]}.get(name, [])

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
        ("arch", "resnt18", "resnet18"),
        ("arch", "nothing_like_it", "timm.list_models()"),
        ("stem", "vit", "imagenet"),
        ("dataset", "imagenet", "flickr25k"),
        ("protocol", "III", "59k"),
        ("cached_views", "-1", "at least 0"),
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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--width=16", "--arch=resnet50"], "--width=16: --arch=resnet50 --stem=imagenet has one"),
        (["--width=16", "--stem=imagenet"], "--width=16: --arch=resnet18 --stem=imagenet has one"),
        (["--pretrained", "--weights=x.pth"], "--weights: contradicts --pretrained"),
        (["--freeze_trunk"], "--freeze_trunk: a trunk without weights"),
        (
            ["--arch=vit_tiny_patch16_224", "--input_size=64", "--crop_size=48"],
            "--crop_size=48: vit_tiny_patch16_224 is built for images of one size",
        ),
        (["--cached_views=4"], "--cached_views: a trunk that learns"),
        (["--dataset=flickr25k"], "--dataset=flickr25k: needs --data_dir"),
        (["--image_dir=x"], "--image_dir: --dataset=cifar10 has no lists"),
        (
            ["--freeze_trunk", "--pretrained", "--cached_views=1", "--early_share=0.5"],
            "--early_crop_size: kept views have one size",
        ),
        (["--protocol=I", "--split=x"], "--protocol: contradicts --split"),
        (
            ["--dataset=flickr25k", "--data_dir=x", "--protocol=gpq"],
            "--protocol=gpq: flickr25k has spq, 38-labels",
        ),
    ],
)
def test_flags_of_data_and_trunk_that_do_not_go_together(flags, message, capsys):
    assert message in refused(capsys, *flags)


def test_defaults_that_depend_on_the_set():
    found = {}
    for name in ("cifar10", "cifar100", "flickr25k", "nuswide", "lists", "folder"):
        args = parse(f"--dataset={name}", "--data_dir=x")
        found[name] = (args.protocol, args.input_size, args.Top_N)
    assert found == {
        "cifar10": ("spq", 32, 1000),
        "cifar100": ("spq", 32, 1000),
        "flickr25k": ("spq", 64, 5000),
        "nuswide": ("100-500", 64, 5000),
        "lists": ("lists", 64, 1000),
        "folder": ("all", 64, 1000),
    }
    args = parse("--dataset=nuswide", "--data_dir=x", "--input_size=224", "--Top_N=100")
    assert (args.input_size, args.Top_N, args.output_dir.name) == (224, 100, "SPQ_nuswide_32bits")
    stems = {arch: parse(f"--arch={arch}").stem for arch in ("resnet18", "resnet50")}
    assert stems == {"resnet18": "cifar", "resnet50": "imagenet"}


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


def test_recipes_are_defaults_that_flags_override():
    plain, released = parse(), parse("--recipe=released")
    assert vars(parse("--recipe=paper")) == vars(plain) | {"given": {"recipe"}}
    assert plain.recipe == "paper"
    names = {"recipe", "given"} | RECIPES["released"].keys()
    same = [name for name in vars(plain) if name not in names]
    assert [getattr(released, n) for n in same] == [getattr(plain, n) for n in same]
    # the released code's own ways, slips included
    assert released.loss == "cqc"
    assert released.lr_schedule == "released"
    assert released.freeze_bn_epoch == 100
    assert released.amp == "off"
    assert released.epochs == 5000
    assert released.distance == "l2"
    assert released.given == {"recipe"}
    both = ("--recipe=released", "--freeze_bn_epoch=3", "--epochs=7")
    for argv in (both, both[::-1]):
        args = parse(*argv)
        assert (args.freeze_bn_epoch, args.epochs, args.loss) == (3, 7, "cqc")
    assert parse("--recipe=fast").recipe == "fast"
    assert parse().loss == "cqc-paper"  # a recipe does not linger


@pytest.mark.parametrize("name", RECIPES)
def test_every_flag_of_a_recipe_exists_and_takes_its_value(name):
    explicit = [f"--{flag}={value}" for flag, value in RECIPES[name].items()]
    written, named = vars(parse(*explicit)), vars(parse(f"--recipe={name}"))
    assert {k: written[k] for k in RECIPES[name]} == RECIPES[name]
    changed = {k for k in named if written[k] != named[k]}
    assert changed <= {"recipe", "given"}


def test_recipes_are_printed_in_the_help(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    page = " ".join(capsys.readouterr().out.split())
    for name, flags in RECIPES.items():
        assert name in page
        for flag, value in flags.items():
            assert f"--{flag}={value}" in page


def test_parts_of_a_batch_must_fit(capsys):
    assert "--accumulate=3" in refused(capsys, "--accumulate=3")
    assert "at least 2 images" in refused(capsys, "--accumulate=8", "--batch_size=8")
    assert "--cuda_graph" in refused(capsys, "--cuda_graph", "--accumulate=2")
    assert parse("--accumulate=4").accumulate == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--early_crop_size=16"], "--early_crop_size: does nothing without --early_share"),
        (["--early_share=0.5"], "--early_share: does nothing without --early_crop_size"),
        (["--muon_lr=0.05"], "--muon_lr: does nothing with --optimizer=adam"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(flags, message, capsys):
    assert message in refused(capsys, *flags)
    # beside the flag that they need they are taken, a recipe's too
    needed = ["--early_crop_size=16", "--early_share=0.5", "--optimizer=muon", "--muon_lr=0.05"]
    assert parse(*needed).early_share == 0.5
    assert parse("--recipe=fast", "--early_share=0").early_share == 0


def test_validation_needs_labels(capsys):
    message = refused(capsys, "--validate", "--dataset=folder", "--data_dir=x")
    assert "--validate: a folder has no labels" in message


def test_crops_of_a_recipe_grow_with_the_images():
    sizes = {32: (24, 16), 64: (48, 32)}
    for side, want in sizes.items():
        args = parse("--recipe=fast", f"--input_size={side}")
        assert (args.crop_size, args.early_crop_size) == want
    args = parse("--recipe=fast", "--input_size=64", "--crop_size=40")
    assert (args.crop_size, args.early_crop_size) == (40, 32)
    args = parse("--input_size=64")
    assert (args.crop_size, args.early_crop_size) == (64, 64)


def test_kept_views_leave_the_early_crops_of_a_recipe_away():
    frozen = ("--freeze_trunk", "--pretrained", "--cached_views=1")
    args = parse("--recipe=fast", "--input_size=64", *frozen)
    assert (args.early_share, args.crop_size) == (0.0, 48)
    assert parse("--recipe=fast", *frozen[:2]).early_share == 0.6
