#!/usr/bin/env bash
# What the scripts for landmarks share; they source it after setup.sh. Where things are:
#
#   DATA_DIR   holds retrieval-SfM-120k/ and gldv2/, each as its authors lay it out (datasets)
#   GALLERY    the gallery network's name (r101-delg), WEIGHTS its published weights
#   TRUNK      ImageNet weights that query networks begin with (those of timm's hub)
#   WORK       where features and anchors go (runs/landmarks)
#
# With --dry_run as the first argument nothing is made but the environment, if there is none: each
# file that the script needs is looked for, each image of the set too, and what is missing is told
# with where it is to be had. The exit code is then 2 if anything is missing.
DATA_DIR="${DATA_DIR:-datasets}"
GALLERY="${GALLERY:-r101-delg}"
WEIGHTS="${WEIGHTS:-weights/R101-DELG.pth}"
WORK="${WORK:-runs/landmarks}"
TRUNK="${TRUNK:-}"
trunk=--pretrained
if [ -n "$TRUNK" ]; then trunk="--weights=$TRUNK"; fi
dry_run="" missing=""
if [ "${1:-}" = --dry_run ]; then dry_run=yes && shift; fi

features_of() { echo "$WORK/$GALLERY-$1.safetensors"; }
anchors_of() { echo "$WORK/$GALLERY-$1-anchors.safetensors"; }

# need FILE WHERE: the second says where it is to be had
need() {
    [ -n "$dry_run" ] || return 0
    if [ -e "$1" ]; then echo "there: $1"; else echo "missing: $1; $2" >&2 && missing=yes; fi
}
need_set() {
    [ -n "$dry_run" ] || return 0
    "$PYTHON" -m data.landmark_batches --dataset="$1" --data_dir="$DATA_DIR" || missing=yes
}
need_weights() {
    need "$WEIGHTS" "the weights of $GALLERY, whitening included, from its authors; WEIGHTS=FILE names another file, GALLERY=NAME another network"
}
need_trunk() {
    [ -n "$dry_run" ] || return 0
    if [ -n "$TRUNK" ]; then
        need "$TRUNK" "weights of mobilenetv2_100; without TRUNK they are fetched from timm's hub"
    else
        echo "to be fetched: ImageNet weights of mobilenetv2_100, from timm's hub; or TRUNK=FILE"
    fi
}
need_features() { need "$(features_of "$1")" "bash scripts/extract_features.sh $1 makes it"; }
need_anchors() { need "$(anchors_of "$1")" "bash scripts/make_anchors.sh $1 makes it"; }

# ends a dry run
all_told() {
    [ -n "$dry_run" ] || return 0
    if [ -n "$missing" ]; then exit 2; fi
    echo "Everything is there."
    exit 0
}
# the set that a script is called for: its first argument, sfm120k without one
take_set() {
    case "${1:-}" in
        sfm120k | gldv2) set="$1" ;;
        "" | --*) set=sfm120k ;;
        *) echo "error: $1: allowed are sfm120k and gldv2" >&2 && exit 2 ;;
    esac
}
