"""Named sets of defaults for --recipe."""

# Every flag that a recipe does not name has the default of args.py.
SPQ_RECIPES: dict[str, dict] = {
    # the equations and settings of the paper: these are the defaults
    "paper": {},
    # what the released code does, its slips included (see README, Departures)
    "released": {
        "loss": "cqc",
        "lr_schedule": "released",
        "freeze_bn_epoch": 100,  # its --eval_epoch: batch norm freezes as it first evaluates
        "amp": "off",
        "epochs": 5000,
        "distance": "l2",
    },
    # for short trainings (results/README.md): four views, and a second stage on neighbours; crops
    # are for images of 32 pixels and grow with --input_size
    "fast": {
        "loss": "cqc",
        "views": 4,
        "batch_size": 128,
        "neighbour_share": 0.15,
        "contrastive_temperature": 0.2,
        "optimizer": "muon",
        "lr": 2e-3,
        "warmup_epochs": 0.25,
        "augmentation": "batched",
        "crop_size": 24,
        "early_crop_size": 16,
        "early_share": 0.6,
        "epochs": 6,
        "eval_epoch": 3,
    },
}

GPQ_RECIPES: dict[str, dict] = {
    # the paper's equations, and the settings of the released code: these are the defaults
    "paper": {},
    # for networks that start from nothing: views that a few labelled images do not run out of
    # (results/README.md)
    "fast": {
        "optimizer": "muon",
        "lr": 2e-3,
        "lr_schedule": "cosine",
        "warmup_epochs": 2.0,
        "augmentation": "batched",
        "crop_min_area": 0.25,
        "jitter_strength": 0.5,
        "crop_size": 24,
    },
}

SSP_RECIPES: dict[str, dict] = {
    # the released settings: these are the defaults. Departure: the rate warms up from near 0, and
    # not from 1e-4
    "paper": {},
    # for images of 32 pixels; views are the default's, cropped and mirrored, as what is to be
    # learned is the feature of the whole image in its own colours (results/README.md)
    "fast": {
        "optimizer": "muon",
        "lr": 2e-3,
        "warmup_epochs": 0.5,
        "batch_size": 256,
        "epochs": 20,
    },
}

RECIPES = {"SPQ": SPQ_RECIPES, "GPQ": GPQ_RECIPES, "SSP": SSP_RECIPES}
RECIPE_INPUT_SIZE = 32  # that the crops of a recipe are for
