#!/usr/bin/env bash
# Ablation SPQ-S: starting from published weights (a ResNet-18 trained with ImageNet's labels) in
# place of random ones; only the first convolution, which is smaller here, begins at random. timm
# fetches the weights; without a network name a file: --no-pretrained --weights=resnet18.pth.
# Compare with train_cifar10_32bits.sh. Resumes if interrupted; further flags go to main_SPQ.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$PYTHON" main_SPQ.py --if_download --N_books=8 --N_words=16 --pretrained \
    --output_dir=runs/SPQ-S_cifar10_32bits --resume=auto "$@"
