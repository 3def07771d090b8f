"""Named sets of defaults for --recipe."""

# Every flag that a recipe does not name has the default of args.py.
RECIPES: dict[str, dict] = {
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
    # for short trainings (results/README.md); crops are for images of 32 pixels and grow with
    # --input_size
    "fast": {
        "loss": "cqc",
        "contrastive_temperature": 0.2,
        "optimizer": "muon",
        "lr": 2e-3,
        "warmup_epochs": 0.25,
        "augmentation": "batched",
        "crop_size": 24,
        "early_crop_size": 16,
        "early_share": 0.6,
        "epochs": 12,
        "eval_epoch": 4,
    },
}

RECIPE_INPUT_SIZE = 32  # that the crops of a recipe are for
