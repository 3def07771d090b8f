"""Command line: both ways of every boolean, released names and defaults, bad values."""

import json
from pathlib import Path

import pytest

from args import (
    METHOD_FLAGS,
    PARSERS,
    SSP_METHODS,
    code_bits,
    flags_of_run,
    parse_anchors_args,
    parse_args,
    parse_extract_args,
)
from utils.logging import plain
from utils.recipes import RECIPES, SPQ_RECIPES

both = pytest.mark.parametrize("method", ["SPQ", "GPQ"])
# files that a method cannot do without
NEEDED = {"SSP": ("--features=f.npy", "--anchors=a.safetensors")}


def parse(*argv, method="SPQ"):
    return parse_args(PARSERS[method](), (*NEEDED.get(method, ()), *argv))


def refused(capsys, *argv, method="SPQ"):
    with pytest.raises(SystemExit) as stop:
        parse(*argv, method=method)
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
    (method, action.dest)
    for method, parser in PARSERS.items()
    for action in parser()._actions
    if type(action).__name__ == "BooleanFlag"
]


@both
def test_there_are_booleans(method):
    names = ("if_download", "compile", "eval_only", "overwrite")
    assert {(method, name) for name in names} <= set(BOOLEANS)


@pytest.mark.parametrize(("method", "name"), BOOLEANS)
def test_booleans_both_ways(method, name, capsys):
    more = {"eval_only": ["--resume=auto"], "freeze_trunk": ["--weights=x.pth"]}.get(name, [])

    def value(*argv):
        return getattr(parse(*more, *argv, method=method), name)

    dashed = name.replace("_", "-")
    assert [value(f"--{name}"), value(f"--{name}=True"), value(f"--{name}=true")] == [True] * 3
    assert [value(f"--{name}=False"), value(f"--no-{name}"), value(f"--no-{dashed}")] == [False] * 3
    message = refused(capsys, f"--{name}=maybe", method=method)
    assert f"--{name}=maybe: must be True or False" in message
    assert "takes no value" in refused(capsys, f"--no-{name}=True", method=method)


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
            "--early_share: kept views have one size",
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


@both
def test_help_shows_every_default(method, capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help", method=method)
    assert stop.value.code == 0
    page = capsys.readouterr().out
    actions = PARSERS[method]()._actions
    for action in actions:
        if action.dest != "help":
            assert f"--{action.dest}" in page
            assert action.help
            assert "default" in action.help or action.default is not None
    assert page.count("(default") >= len(actions) - 1


def test_an_empty_resume_and_a_warm_up_without_effect_are_refused(capsys):
    assert "--resume=" in refused(capsys, "--resume=")
    message = refused(capsys, "--warmup_epochs=2", "--lr_schedule=released")
    assert "--warmup_epochs=2" in message


def test_recipes_are_defaults_that_flags_override():
    plain, released = parse(), parse("--recipe=released")
    assert vars(parse("--recipe=paper")) == vars(plain) | {"given": {"recipe"}}
    assert plain.recipe == "paper"
    names = {"recipe", "given"} | SPQ_RECIPES["released"].keys()
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


@pytest.mark.parametrize(
    ("method", "name"), [(method, name) for method, recipes in RECIPES.items() for name in recipes]
)
def test_every_flag_of_a_recipe_exists_and_takes_its_value(method, name):
    recipe = RECIPES[method][name]
    explicit = [f"--{flag}={value}" for flag, value in recipe.items()]
    written = vars(parse(*explicit, method=method))
    named = vars(parse(f"--recipe={name}", method=method))
    assert {k: written[k] for k in recipe} == recipe
    changed = {k for k in named if written[k] != named[k]}
    assert {"features", "anchors"}.isdisjoint(changed)
    assert changed <= {"recipe", "given"}


@pytest.mark.parametrize("method", RECIPES)
def test_recipes_are_printed_in_the_help(method, capsys):
    with pytest.raises(SystemExit):
        parse("--help", method=method)
    page = " ".join(capsys.readouterr().out.split())
    for name, flags in RECIPES[method].items():
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


def test_kept_views_bound_the_views_of_a_step(capsys):
    frozen = ("--freeze_trunk", "--pretrained", "--cached_views=2")
    assert parse("--recipe=fast", *frozen).views == 3  # of a recipe's four
    assert parse("--views=3", *frozen).views == 3
    assert "--cached_views=2 gives 3 views" in refused(capsys, "--views=4", *frozen)


# --- main_GPQ.py --------------------------------------------------------------------------------


def test_gpq_s_defaults_are_those_of_its_paper_and_its_code():
    args = parse(method="GPQ")
    published = {
        "arch": "cifar_vgg",
        "width": 64,
        "stem": "cifar",
        "N_books": 12,
        "N_words": 16,
        "L_word": 12,
        "soft_quantization_scale": 20.0,
        "classification_scale": 4.0,
        "n_pair_weight": 1.0,
        "entropy_weight": 0.1,
        "classification_weight": 0.1,
        "reversal_weight": 1.0,
        "reversal_warmup_epochs": 0.0,
        "labels_per_class": None,  # all that the split gives, which are 500
        "batch_size": 500,
        "epochs": 300,
        "optimizer": "adam",
        "lr": 2e-4,
        "beta1": 0.5,
        "weight_decay": 0.0,
        "lr_schedule": "staircase",
        "warmup_epochs": 0.0,
        "dataset": "cifar10",
        "protocol": "gpq",
        "input_size": 32,
        "distance": "inner_product",
        "Top_N": "all",
        "num_cls": None,
    }
    for name, value in published.items():
        assert getattr(args, name) == value, name
    assert code_bits(args) == 48
    assert args.output_dir == Path("runs/GPQ_cifar10_48bits")
    for books, bits in ((3, 12), (6, 24), (8, 32)):
        assert code_bits(parse(f"--N_books={books}", method="GPQ")) == bits


def test_what_gpq_does_not_have_is_not_taken_from_spq(capsys):
    """They share the code that reads these; GPQ has a value for each that is never another."""
    taken = ["--recipe=released", "--quantizer=hard", "--distance=l2", "--loss=cqc"]
    taken += ["--contrastive_temperature=0.2", "--joint_views=True"]
    assert parse(*taken).quantizer == "hard"  # all of them
    for flag in taken:
        assert flag.split("=")[0] in refused(capsys, flag, method="GPQ")
    args = parse("--input_size=64", method="GPQ")
    assert (args.recipe, args.quantizer, args.distance) == ("paper", "prototype", "inner_product")
    assert (args.crop_size, args.early_crop_size, args.early_share) == (64, 64, 0.0)
    # and the other way round
    assert "crop-flip" in refused(capsys, "--augmentation=crop-flip")
    for name in ("labels_per_class", "classification_scale", "entropy_weight", "reversal_weight"):
        assert f"--{name}=2" in refused(capsys, f"--{name}=2")


def test_gpq_s_defaults_leave_spq_s_alone():
    before = vars(parse())
    parse("--N_books=3", method="GPQ")
    assert vars(parse()) == before
    assert (parse().beta1, parse().lr_schedule, parse().Top_N) == (0.9, "cosine", 1000)


def test_gpq_may_have_spq_s_views(capsys):
    args = parse("--augmentation=batched", "--crop_size=24", "--jitter_strength=0.5", method="GPQ")
    assert (args.crop_size, args.early_crop_size, args.jitter_strength) == (24, 24, 0.5)
    assert parse(method="GPQ").augmentation == "crop-flip"
    # which GPQ's own would not heed
    for flag in ("--crop_size=24", "--crop_min_area=0.5", "--jitter_strength=2", "--early_share=1"):
        message = refused(capsys, flag, method="GPQ")
        assert flag.split("=")[0] in message
        assert "--augmentation=crop-flip" in message
        parse(
            flag, "--early_crop_size=16", "--early_share=1", "--augmentation=kornia", method="GPQ"
        )
    sizes = ["--early_crop_size=16", "--early_share=0.5"]
    assert "--early_crop_size" in refused(capsys, *sizes, method="GPQ")
    assert parse(*sizes, "--augmentation=batched", method="GPQ").early_crop_size == 16


def test_a_recipe_s_warm_up_is_no_longer_than_the_training(capsys):
    assert parse("--recipe=fast", "--epochs=1", method="GPQ").warmup_epochs == 1
    assert parse("--recipe=fast", "--epochs=9", method="GPQ").warmup_epochs == 2
    message = refused(capsys, "--warmup_epochs=2", "--epochs=1", method="GPQ")
    assert "--warmup_epochs=2: must be at most --epochs=1" in message


def test_what_would_do_nothing_to_gpq_s_own_views_may_be_said():
    assert parse("--early_share=0", method="GPQ").early_share == 0


def test_crops_of_gpq_s_fast_recipe_belong_to_its_views():
    args = parse("--recipe=fast", "--input_size=64", method="GPQ")
    assert (args.augmentation, args.crop_size, args.early_crop_size) == ("batched", 48, 48)
    args = parse("--recipe=fast", "--augmentation=crop-flip", method="GPQ")
    assert (args.crop_size, args.early_crop_size, args.optimizer) == (32, 32, "muon")


def test_each_method_has_its_own_released_schedule(capsys):
    assert "staircase" in refused(capsys, "--lr_schedule=staircase")
    assert "released" in refused(capsys, "--lr_schedule=released", method="GPQ")
    for name in ("cosine", "constant"):
        for method in PARSERS:
            assert parse(f"--lr_schedule={name}", method=method).lr_schedule == name
    assert parse("--lr_schedule=staircase", "--warmup_epochs=2", method="GPQ").warmup_epochs == 2


@pytest.mark.parametrize(
    ("flag", "value", "allowed"),
    [
        ("labels_per_class", "0", "at least 1"),
        ("labels_per_class", "2.5", "whole number"),
        ("classification_scale", "0", "above 0"),
        ("n_pair_weight", "-1", "at least 0"),
        ("entropy_weight", "nan", "at least 0"),
        ("classification_weight", "inf", "finite"),
        ("reversal_weight", "-0.5", "at least 0"),
        ("reversal_warmup_epochs", "-1", "at least 0"),
        ("beta1", "1", "at most 0.999"),
        ("beta1", "-0.1", "at least 0"),
        ("lr_schedule", "step", "staircase"),
        ("Top_N", "0", "at least 1"),
        ("Top_N", "every", "whole number"),
        ("Top_N", "1.5", "whole number"),
        ("stem", "imagenet", "cifar_vgg has no such; allowed is cifar"),
    ],
)
def test_gpq_names_flag_value_and_what_is_allowed(flag, value, allowed, capsys):
    message = refused(capsys, f"--{flag}={value}", method="GPQ")
    assert f"--{flag}" in message
    assert value in message
    assert allowed in message


@both
def test_the_whole_ranking_may_be_asked_for(method):
    assert parse("--Top_N=all", method=method).Top_N == "all"
    assert parse("--Top_N=70", method=method).Top_N == 70
    assert parse("--beta1=0", method=method).beta1 == 0.0


def test_a_loss_must_be_left(capsys):
    weights = ("n_pair_weight", "entropy_weight", "classification_weight")
    message = refused(capsys, *(f"--{name}=0" for name in weights), method="GPQ")
    assert all(f"--{name}" in message for name in weights)
    assert "nothing would be learned" in message
    for kept in weights:
        flags = [f"--{name}=0" for name in weights if name != kept]
        assert getattr(parse(*flags, method="GPQ"), kept) > 0


def test_gpq_s_defaults_that_depend_on_the_set(capsys):
    found = {}
    for name in ("cifar10", "cifar100", "flickr25k", "nuswide", "lists", "folder"):
        args = parse(f"--dataset={name}", "--data_dir=x", method="GPQ")
        found[name] = (args.protocol, args.input_size, args.Top_N)
    assert found == {
        "cifar10": ("gpq", 32, "all"),
        "cifar100": ("spq", 32, "all"),
        "flickr25k": ("spq", 64, "all"),
        "nuswide": ("100-500", 64, "all"),
        "lists": ("lists", 64, "all"),
        "folder": ("class-folders", 64, "all"),
    }
    assert parse("--protocol=59k", method="GPQ").protocol == "59k"
    assert parse("--split=my.split", method="GPQ").protocol is None
    folder = ("--dataset=folder", "--data_dir=x", "--validate")
    assert parse(*folder, method="GPQ").validate
    message = refused(capsys, *folder, "--protocol=all", method="GPQ")
    assert "--validate: a folder has no labels" in message


def test_gpq_keeps_views_of_a_frozen_trunk_only(capsys):
    assert "--cached_views" in refused(capsys, "--cached_views=2", method="GPQ")
    frozen = ("--arch=tf_efficientnet_lite0", "--pretrained", "--freeze_trunk")
    assert parse(*frozen, "--cached_views=2", method="GPQ").cached_views == 2


# --- main_SSP.py --------------------------------------------------------------------------------

# of no method but theirs: a value for each
OWN_FLAGS = {
    "anchors": "b.safetensors",
    "similarity_scale": 5.0,
    "classification_scale": 20.0,
    "new_margin": 0.3,
    "old_margin": 0.1,
    "contrastive_margin": 0.5,
    "tuples": 100,
    "pool": 400,
    "negatives": 2,
}


def parse_ssp(*argv):
    return parse_args(PARSERS["SSP"](), ("--features=f.npy", *argv))


def refused_by_ssp(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        parse_args(PARSERS["SSP"](), argv)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def test_ssp_s_defaults_are_those_of_its_paper():
    args = parse(method="SSP")
    published = {
        "method": "ssp",
        "arch": "mobilenetv2_100",
        "stem": "imagenet",
        "gem_p": 3.0,
        "trainable_p": False,
        "similarity_scale": 10.0,
        "classification_scale": 45.2548,
        "new_margin": 0.15,
        "contrastive_margin": 0.7,
        "tuples": 2000,
        "pool": 20000,
        "negatives": 5,
        "batch_size": 64,
        "epochs": 10,
        "warmup_epochs": 5.0,
        "optimizer": "sgd",
        "lr": 1e-3 * 64 / 256,
        "weight_decay": 1e-6,
        "lr_schedule": "cosine",
        "augmentation": "crop-flip",
        "distance": "query-gallery",
    }
    for name, value in published.items():
        assert getattr(args, name) == value, name
    assert (args.features, args.anchors) == (Path("f.npy"), Path("a.safetensors"))
    assert args.output_dir == Path("runs/SSP_cifar10_ssp")
    assert parse_ssp("--method=lce").output_dir == Path("runs/SSP_cifar10_lce")
    margins = {method: parse_ssp(f"--method={method}").old_margin for method in ("hvs", "lce")}
    assert margins == {"hvs": 0.15, "lce": 0.2}
    assert parse_ssp("--method=lce", "--old_margin=0").old_margin == 0


def test_rate_and_warm_up_of_ssp_follow_the_batch_and_the_epochs():
    args = parse("--batch_size=128", "--epochs=5", method="SSP")
    assert (args.lr, args.warmup_epochs) == (5e-4, 2.5)
    args = parse("--batch_size=128", "--lr=0.1", "--warmup_epochs=0", method="SSP")
    assert (args.lr, args.warmup_epochs) == (0.1, 0.0)
    args = parse("--recipe=fast", method="SSP")
    assert (args.lr, args.warmup_epochs, args.batch_size) == (2e-3, 0.5, 256)


def test_there_is_a_value_for_each_flag_of_one_method():
    assert OWN_FLAGS.keys() == METHOD_FLAGS.keys()


@pytest.mark.parametrize("method", SSP_METHODS)
def test_flags_of_the_other_methods_are_refused(method, capsys):
    needed = ["--features=f.npy", *(["--anchors=a.safetensors"] if method == "ssp" else [])]
    for name, methods in METHOD_FLAGS.items():
        words = [*needed, f"--method={method}", f"--{name}={OWN_FLAGS[name]}"]
        if method in methods:
            assert str(getattr(parse_args(PARSERS["SSP"](), words), name)) == str(OWN_FLAGS[name])
        else:
            message = refused_by_ssp(capsys, *words)
            assert f"--{name}: does nothing with --method={method}; allowed with" in message
            assert all(other in message.rpartition("allowed")[2] for other in methods)


def test_files_that_ssp_cannot_do_without_are_asked_for(capsys):
    message = refused_by_ssp(capsys, "--method=regression")
    assert "--features: the gallery's must be named; extract_features.py makes them" in message
    message = refused_by_ssp(capsys, "--features=f.npy")
    assert "--anchors: --method=ssp needs them; make_anchors.py makes them" in message
    # an evaluation needs no anchors, and the other methods never do
    assert parse_ssp("--eval_only", "--resume=auto").anchors is None
    assert parse_ssp("--method=aml").anchors is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method=lace"], "lce"),
        (["--similarity_scale=0"], "above 0"),
        (["--method=aml", "--negatives=0"], "at least 1"),
        (["--method=hvs", "--new_margin=4"], "at most 3.14"),
        (["--arch=resnet18", "--gem_p=2"], "--gem_p: resnet18 has an average at its end"),
        (["--arch=cifar_vgg", "--trainable_p"], "--trainable_p: cifar_vgg has an average"),
        (["--N_books=4"], "--N_books=4"),
        (["--freeze_trunk"], "--freeze_trunk"),
        (["--lr_schedule=staircase"], "cosine"),
        (["--recipe=released"], "paper"),
    ],
)
def test_ssp_names_what_is_wrong(flags, message, capsys):
    assert message in refused_by_ssp(capsys, *NEEDED["SSP"], *flags)


def test_a_pooling_may_learn_where_there_is_one():
    args = parse("--trainable_p", "--gem_p=2", method="SSP")
    assert (args.trainable_p, args.gem_p) == (True, 2.0)
    assert parse("--arch=resnet18", "--stem=imagenet", "--gem_p=2", method="SSP").gem_p == 2


def test_features_are_extracted_from_a_set_and_a_network(capsys):
    words = ["--gallery=runs/x", "--output=f.safetensors"]
    args = parse_extract_args(words)
    assert (args.gallery, args.dataset, args.protocol) == ("runs/x", "cifar10", "spq")
    assert "input_size" not in args.given  # the network's own
    args = parse_extract_args([*words, "--input_size", "64", "--dataset=lists", "--data_dir=x"])
    assert (args.given >= {"input_size", "data_dir"}, args.input_size) == (True, 64)
    for wrong, message in (
        ([words[0]], "--output"),
        ([words[1]], "--gallery"),
        ([words[0], "--output=f.npy"], "--output=f.npy: allowed is a name that ends in .safetens"),
        ([*words, "--dataset=lists"], "--dataset=lists: needs --data_dir"),
        ([*words, "--limit_train=5"], "--limit_train"),
    ):
        with pytest.raises(SystemExit):
            parse_extract_args(wrong)
        assert message in capsys.readouterr().err


def test_anchors_are_of_features_or_of_a_model(capsys):
    out = "--output=a.safetensors"
    args = parse_anchors_args(["--features=f.npy", out])
    paper = {"M": 32, "bits": 8, "iterations": 10, "restarts": 2, "max_points": 1000}
    assert {name: getattr(args, name) for name in paper} == paper
    assert parse_anchors_args(["--codebooks_of=runs/x", out]).codebooks_of == Path("runs/x")
    for wrong, message in (
        ([out], "--features --codebooks_of"),
        (["--features=f.npy", "--codebooks_of=x", out], "--codebooks_of"),
        (["--features=f.npy", "--output=a"], "--output=a: allowed is a name that ends in .safet"),
        (["--features=f.npy", out, "--bits=0"], "at least 1"),
        (["--features=f.npy", out, "--M=0"], "at least 1"),
    ):
        with pytest.raises(SystemExit):
            parse_anchors_args(wrong)
        assert message in capsys.readouterr().err


# --- flags of a run -----------------------------------------------------------------------------


@both
def test_flags_of_a_run_come_back_as_they_were(method):
    words = ["--N_books=6", "--data_dir=elsewhere", "--image_dir=photos", "--dataset=lists"]
    args = parse(*words, "--Top_N=all", "--weights=w.pth", "--max_steps=9", method=method)
    del args.given
    found = vars(flags_of_run(method, json.loads(json.dumps(plain(args)))))  # as args.json has them
    assert found == vars(args)
    assert isinstance(found["image_dir"], Path)
    assert found["split"] is None


@both
def test_flags_that_a_run_did_not_know_have_the_defaults_of_its_method(method):
    defaults = vars(parse(method=method))
    found = vars(flags_of_run(method, {"L_word": 5, "n_classes": 7}))
    assert found.pop("n_classes") == 7  # no flag, and kept all the same
    assert found == {k: v for k, v in defaults.items() if k != "given"} | {"L_word": 5}
    # a flag that is younger than the run
    old = {name: value for name, value in plain(parse(method=method)).items() if name != "beta1"}
    assert flags_of_run(method, old).beta1 == {"SPQ": 0.9, "GPQ": 0.5}[method]
    with pytest.raises(KeyError):
        flags_of_run("PQ", {})


def test_flags_of_a_run_of_ssp_come_back_as_they_were():
    args = parse("--batch_size=32", "--weights=w.pth", method="SSP")
    del args.given
    found = vars(flags_of_run("SSP", json.loads(json.dumps(plain(args)))))
    assert found == vars(args)
    assert isinstance(found["features"], Path)
    defaults = flags_of_run("SSP", {})
    assert (defaults.method, defaults.features, defaults.anchors) == ("ssp", None, None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--beta1=0.9", "--optimizer=sgd"], "--beta1: does nothing with --optimizer=sgd"),
        (["--reversal_weight=2", "--entropy_weight=0"], "--reversal_weight: does nothing with"),
        (["--reversal_warmup_epochs=2", "--reversal_weight=0"], "nothing with --reversal_weight=0"),
        (["--reversal_warmup_epochs=9", "--epochs=6"], "must be at most --epochs=6"),
        (["--Top_N=some"], "at least 1, or all"),
        (["--stem=imagenet"], "--stem=imagenet: cifar_vgg has no such; allowed is cifar"),
    ],
)
def test_flags_of_gpq_that_would_do_nothing_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(PARSERS["GPQ"](), flags)
    assert message in capsys.readouterr().err
