#!/usr/bin/env bash
# AML, what SSP is compared with, MobileNetV2 for R101-DELG, trained on the clean part of Google
# Landmarks v2: 2,000 tuples an epoch, positives of the query's landmark, as long as on SfM-120k. A
# batch is 64 tuples, in 16 parts of 28 images (--accumulate).
# Resumes if interrupted; further flags go to main_SSP.py. --dry_run as the first argument only
# looks for what is needed (landmarks.sh says where).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
source scripts/landmarks.sh
need_set gldv2
need_features gldv2
need_trunk
all_told
exec "$PYTHON" main_SSP.py --dataset=gldv2 --data_dir="$DATA_DIR" --method=aml \
    --features="$(features_of gldv2)" --arch=mobilenetv2_100 "$trunk" \
    --epochs=200 --warmup_epochs=5 --batch_size=64 --accumulate=16 \
    --output_dir=runs/SSP_gldv2_aml --resume=auto "$@"
