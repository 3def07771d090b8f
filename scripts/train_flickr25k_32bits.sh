#!/usr/bin/env bash
# SPQ on FLICKR25K at 32 bits: images of 64 pixels, ResNet-50, mAP@5000. README, "Other data sets",
# tells which files --data_dir needs. Resumes if interrupted; further flags go to main_SPQ.py, for
# example --data_dir=DIR, --skip_missing or --epochs=200.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$PYTHON" main_SPQ.py --dataset=flickr25k --data_dir=datasets/flickr25k --arch=resnet50 \
    --N_books=8 --N_words=16 --L_word=16 \
    --output_dir=runs/SPQ_flickr25k_32bits --resume=auto "$@"
