#!/usr/bin/env bash
# SSP, MobileNetV2 for R101-DELG, trained on the clean part of Google Landmarks v2 with the published
# settings: 512 pixels, batches of 128, 5 epochs; anchors of SfM-120k (or of $ANCHORS_OF).
# Resumes if interrupted; further flags go to main_SSP.py. --dry_run as the first argument only
# looks for what is needed (landmarks.sh says where).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
source scripts/landmarks.sh
need_set gldv2
need_features gldv2
need_anchors "${ANCHORS_OF:-sfm120k}"
need_trunk
all_told
exec "$PYTHON" main_SSP.py --dataset=gldv2 --data_dir="$DATA_DIR" --method=ssp \
    --features="$(features_of gldv2)" --anchors="$(anchors_of "${ANCHORS_OF:-sfm120k}")" \
    --arch=mobilenetv2_100 "$trunk" --output_dir=runs/SSP_gldv2_ssp --resume=auto "$@"
