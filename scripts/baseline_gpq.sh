#!/usr/bin/env bash
# What GPQ is held against: the same network trained on the same 5,000 labels by the
# classification loss alone, and its descriptors quantized afterwards by FAISS, at 48 bits.
# Resumes if interrupted; further flags go to main_GPQ.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
run=runs/GPQ_supervised_cifar10_48bits
"$PYTHON" main_GPQ.py --if_download --N_books=12 --n_pair_weight=0 --entropy_weight=0 \
    --classification_weight=1 --output_dir="$run" --resume=auto "$@"
exec "$PYTHON" scripts/baselines.py "$run" --features=descriptors,pooled,pooled_unit \
    --methods=pq,opq,itq,exact,cosine --output="$run/baselines"
