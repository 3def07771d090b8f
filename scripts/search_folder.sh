#!/usr/bin/env bash
# Search a folder of your own images with a network trained on these very images, without labels.
#
#     bash scripts/search_folder.sh PICTURES QUERY.jpg [flags of main_SPQ.py]
#
# Trains, makes an index, asks it, writes a page to look at. Interrupted, it goes on where it was. Once
# there is an index, it takes in new images and asks, with the network as it is; delete the run's
# folder to train anew. A folder of fewer than 64 images wants a smaller --batch_size.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: bash scripts/search_folder.sh PICTURES QUERY [flags of main_SPQ.py]" >&2
    exit 2
fi
images="$(realpath "$1")"
query="$(realpath "$2")"
shift 2
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
# one run for each folder, also where two folders have the same name
run="runs/folder_$(basename "$images")_$(printf %s "$images" | cksum | cut -d' ' -f1)"
if [ ! -e "$run/index/manifest.json" ]; then
    "$PYTHON" main_SPQ.py --dataset=folder --data_dir="$images" --skip_missing \
        --loss=cqc --width=16 --input_size=64 --batch_size=64 --epochs=20 --warmup_epochs=1 \
        --lr=2e-3 --contrastive_temperature=0.2 --soft_quantization_scale=10 \
        --output_dir="$run" --resume=auto "$@"
    "$PYTHON" search.py build --checkpoint "$run" --index "$run/index" --images "$images"
else
    "$PYTHON" search.py add --index "$run/index" --images "$images"
fi
"$PYTHON" search.py query --index "$run/index" --image "$query" --html "$run/result.html"
