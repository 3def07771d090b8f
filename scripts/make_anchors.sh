#!/usr/bin/env bash
# The second step of SSP for landmarks: anchors, the centroids of a product quantizer of 32 subspaces
# and 8 bits on features of a set. Argument: sfm120k (default) or gldv2; further flags go to
# make_anchors.py. --dry_run as the first argument only looks for what is needed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
source scripts/landmarks.sh
take_set "${1:-}"
if [ "${1:-}" = "$set" ]; then shift; fi
need_features "$set"
all_told
exec "$PYTHON" make_anchors.py --features="$(features_of "$set")" --M=32 --bits=8 \
    --output="$(anchors_of "$set")" "$@"
