#!/usr/bin/env bash
# AML, what SSP is compared with, MobileNetV2 for R101-DELG, trained on SfM-120k: 2,000 tuples an epoch
# of the set's own query and positive and 5 hard negatives, 200 epochs. A batch is 64 tuples, in 8
# parts of 56 images (--accumulate).
# Resumes if interrupted; further flags go to main_SSP.py. --dry_run as the first argument only
# looks for what is needed (landmarks.sh says where).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
source scripts/landmarks.sh
need_set sfm120k
need_features sfm120k
need_trunk
all_told
exec "$PYTHON" main_SSP.py --dataset=sfm120k --data_dir="$DATA_DIR" --method=aml \
    --features="$(features_of sfm120k)" --arch=mobilenetv2_100 "$trunk" \
    --epochs=200 --warmup_epochs=5 --batch_size=64 --accumulate=8 \
    --output_dir=runs/SSP_sfm120k_aml --resume=auto "$@"
