#!/usr/bin/env bash
# Asymmetric retrieval on CIFAR-10: the database is embedded by GPQ's network of width 32, and a
# network of width 8, a sixteenth of its multiplications, learns to answer queries. First argument:
# the method, ssp (default), regression, aml, hvs or lce. Resumes if interrupted; further flags go to
# main_SSP.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
method=ssp
case "${1:-}" in ssp | regression | aml | hvs | lce) method="$1" && shift ;; esac
gallery=results/gpq_48bits_width32 features=runs/ssp_cifar10/gallery.safetensors
anchors=runs/ssp_cifar10/anchors.safetensors
if [ ! -f "$features" ]; then
    "$PYTHON" extract_features.py --if_download --gallery="$gallery" --output="$features"
fi
flags=()
if [ "$method" = ssp ]; then
    if [ ! -f "$anchors" ]; then
        "$PYTHON" make_anchors.py --features="$features" --M=12 --output="$anchors"
    fi
    flags=("--anchors=$anchors")
elif [ "$method" = aml ]; then
    # seven images a tuple: about as many an epoch and a batch as the others have
    flags=(--tuples=8000 --batch_size=40)
fi
exec "$PYTHON" main_SSP.py --if_download --protocol=gpq --recipe=fast --method="$method" \
    --features="$features" ${flags[@]+"${flags[@]}"} --arch=cifar_vgg --width=8 --eval_before \
    --output_dir="runs/SSP_cifar10_$method" --resume=auto "$@"
