#!/usr/bin/env bash
# GPQ on CIFAR-10 at 48 bits, the paper's setting: 5,000 labelled and 54,000 unlabelled images,
# 3,000 steps. Resumes if interrupted; further flags go to main_GPQ.py, for example --recipe=fast,
# which suits a network that starts from nothing, --gpu_id=1, --width=16 on a CPU, or
# --labels_per_class=50.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$PYTHON" main_GPQ.py --if_download --N_books=12 --N_words=16 --L_word=12 \
    --output_dir=runs/GPQ_cifar10_48bits --resume=auto "$@"
