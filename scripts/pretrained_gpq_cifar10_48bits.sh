#!/usr/bin/env bash
# GPQ at 48 bits on the features of a network trained with ImageNet's labels, EfficientNet-Lite0,
# frozen: CIFAR-10's images at 96 pixels and one view of each go through it once (a quarter of
# an hour on 2 CPU cores), after which 3,000 steps take minutes. Resumes if interrupted; further flags go to
# main_GPQ.py, for example --labels_per_class=50 --epochs=3000.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$PYTHON" main_GPQ.py --if_download --N_books=12 --arch=tf_efficientnet_lite0 --pretrained \
    --freeze_trunk --cached_views=1 --input_size=96 --amp=bf16 --eval_epoch=100 \
    --output_dir=runs/GPQ_pretrained_cifar10_48bits --resume=auto "$@"
