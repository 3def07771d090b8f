#!/usr/bin/env bash
# Ablation SPQ-Q: one vector quantizer over all D = 128 dimensions in place of the product.
# One codebook of 4,096 words has 12 bits; 32 bits would need 2^32 words.
# Compare with train_cifar10_32bits.sh. Resumes if interrupted; further flags go to main_SPQ.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$PYTHON" main_SPQ.py --if_download --N_books=8 --N_words=4096 --quantizer=vq \
    --output_dir=runs/SPQ-Q_cifar10_12bits --resume=auto "$@"
