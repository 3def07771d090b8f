#!/usr/bin/env bash
# SSP, MobileNetV2 for R101-DELG, trained on SfM-120k with the published settings: 362 pixels, batches
# of 64, 10 epochs. The paper's anchors are of another set than the one trained on, as here with
# ANCHORS_OF=gldv2; by default they are of SfM-120k too, which is 30 times smaller.
# Resumes if interrupted; further flags go to main_SSP.py. --dry_run as the first argument only
# looks for what is needed (landmarks.sh says where).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
source scripts/landmarks.sh
need_set sfm120k
need_features sfm120k
need_anchors "${ANCHORS_OF:-sfm120k}"
need_trunk
all_told
exec "$PYTHON" main_SSP.py --dataset=sfm120k --data_dir="$DATA_DIR" --method=ssp \
    --features="$(features_of sfm120k)" --anchors="$(anchors_of "${ANCHORS_OF:-sfm120k}")" \
    --arch=mobilenetv2_100 "$trunk" --output_dir=runs/SSP_sfm120k_ssp --resume=auto "$@"
