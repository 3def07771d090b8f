#!/usr/bin/env bash
# HVS, what SSP is compared with, MobileNetV2 for R101-DELG, trained on the clean part of Google
# Landmarks v2 with SSP's settings. The gallery's classifier is the mean feature of each landmark.
# Resumes if interrupted; further flags go to main_SSP.py. --dry_run as the first argument only
# looks for what is needed (landmarks.sh says where).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
source scripts/landmarks.sh
need_set gldv2
need_features gldv2
need_trunk
all_told
exec "$PYTHON" main_SSP.py --dataset=gldv2 --data_dir="$DATA_DIR" --method=hvs \
    --features="$(features_of gldv2)" \
    --arch=mobilenetv2_100 "$trunk" --output_dir=runs/SSP_gldv2_hvs --resume=auto "$@"
