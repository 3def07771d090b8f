#!/usr/bin/env bash
# SPQ on CIFAR-10 at 16 bits, the paper's setting. Resumes if interrupted; further flags go to
# main_SPQ.py, for example --gpu_id=1 or --epochs=200.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$PYTHON" main_SPQ.py --if_download --N_books=4 --N_words=16 --L_word=16 \
    --output_dir=runs/SPQ_cifar10_16bits --resume=auto "$@"
