#!/usr/bin/env bash
# GPQ on CIFAR-10 at 48 bits without the N-pair product quantization loss, so that the codebooks
# are mixtures of the prototypes that nothing trains as such. Resumes if interrupted; further
# flags go to main_GPQ.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$PYTHON" main_GPQ.py --if_download --N_books=12 --n_pair_weight=0 \
    --output_dir=runs/GPQ_no_n_pair_cifar10_48bits --resume=auto "$@"
