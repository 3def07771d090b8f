#!/usr/bin/env bash
# Ablation SPQ-H: hard assignment (straight-through) in place of the soft one.
# Compare with train_cifar10_32bits.sh. Resumes if interrupted; further flags go to main_SPQ.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$PYTHON" main_SPQ.py --if_download --N_books=8 --N_words=16 --quantizer=hard \
    --output_dir=runs/SPQ-H_cifar10_32bits --resume=auto "$@"
