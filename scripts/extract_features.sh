#!/usr/bin/env bash
# The first step of SSP for landmarks: features of all images of a set by the gallery network,
# R101-DELG. Argument: sfm120k (default) or gldv2; further flags go to extract_features.py. Goes on if
# interrupted. --dry_run as the first argument only looks for what is needed (landmarks.sh says where).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
source scripts/landmarks.sh
take_set "${1:-}"
if [ "${1:-}" = "$set" ]; then shift; fi
need_set "$set"
need_weights
all_told
exec "$PYTHON" extract_features.py --dataset="$set" --data_dir="$DATA_DIR" --gallery="$GALLERY" \
    --gallery_weights="$WEIGHTS" --output="$(features_of "$set")" "$@"
