"""Named sets of defaults for --recipe."""

# Every flag that a recipe does not name has the default of args.py.
RECIPES: dict[str, dict] = {
    # the equations and settings of the paper: these are the defaults
    "paper": {},
    # what the released code does, its slips included (see README, Departures)
    "released": {
        "loss": "cqc",
        "lr_schedule": "released",
        "freeze_bn": True,
        "epochs": 5000,
        "distance": "l2",
    },
    "fast": {},
}
