#!/usr/bin/env bash
# From nothing to a trained 32-bit SPQ: environment, CIFAR-10, a narrow ResNet-18, mAP, pictures.
# About 20 minutes on one core of an AMD EPYC with --amp=bf16. Interrupt it and call it again: it goes on
# where it was. Further flags go to main_SPQ.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$PYTHON" main_SPQ.py --if_download --recipe=fast --width=16 --N_books=8 --N_words=16 \
    --output_dir=runs/quickstart_32bits --resume=auto "$@"
