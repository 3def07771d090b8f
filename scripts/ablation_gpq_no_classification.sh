#!/usr/bin/env bash
# GPQ on CIFAR-10 at 48 bits without the classification loss. Resumes if interrupted; further
# flags go to main_GPQ.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$PYTHON" main_GPQ.py --if_download --N_books=12 --classification_weight=0 \
    --output_dir=runs/GPQ_no_classification_cifar10_48bits --resume=auto "$@"
