#!/usr/bin/env bash
# SPQ at 32 bits on features of a network trained with ImageNet's labels, EfficientNet-Lite2, and
# FAISS's quantizers on the same features beside it. CIFAR-10 stands for a folder of images: they
# are written as files of 96 pixels, and the folders test/ and train/ are queries and database.
# Resumes if interrupted; further flags go to main_SPQ.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
pictures=datasets/cifar10_96px
run=runs/pretrained_cifar10_32bits
if [ ! -e "$pictures" ]; then
    rm -rf "$pictures.part"
    "$PYTHON" -m data.cifar10 datasets --export "$pictures.part" --size=96
    mv "$pictures.part" "$pictures"
fi
"$PYTHON" main_SPQ.py --dataset=folder --protocol=class-folders --data_dir="$pictures" \
    --input_size=96 --arch=tf_efficientnet_lite2 --pretrained --freeze_trunk --cached_views=2 \
    --views=3 --augmentation=batched --crop_min_area=0.25 --loss=cqc --contrastive_temperature=0.2 \
    --neighbour_share=0.625 --neighbour_cqc=0.1 --batch_size=160 --amp=bf16 --lr=1.5e-3 \
    --warmup_epochs=0.25 --epochs=16 --eval_epoch=8 --N_books=8 --N_words=16 \
    --output_dir="$run" --resume=auto "$@"
exec "$PYTHON" scripts/baselines.py "$run" --bits=32 --features=pooled,pooled_unit,descriptors \
    --methods=spq,pq,opq,itq,exact,cosine --output="$run/baselines"
