#!/usr/bin/env bash
# Trains the shipped models dvdgan (one moving digit, ten classes) and dvdgan-push (frames of the arm from the four before)
# from nothing, and measures them. About an hour on two CPU cores. An interrupted run goes on when the script is run again.
#
#     bash examples/train_dvdgan.sh [FOLDER]        needs fastvid on the path, and pybullet (Python 3.11 or older)
set -euo pipefail
work=${1:-runs/dvdgan}

train() {  # run folder, options
    local out="$work/$1" resume=()
    shift
    if [ -d "$out/checkpoint" ]; then resume=(--resume); fi
    # another number of threads rounds differently
    fastvid train dvdgan --out "$out" --threads 1 --batch-size 8 --generator-rate 1e-3 --discriminator-rate 5e-4 \
        --ema-decay 0.98 --ema-start 100 --checkpoint-every 50 --sample-every 100 "$@" "${resume[@]}"
}

fastvid data make push --out "$work/push" --split train --clips 2000 --workers 2
fastvid data make push --out "$work/push" --split test --clips 256 --workers 2

train digits --preset digits32 --data 'digits?count=1' --steps 693 &
train arm --preset push32-fp --data "$work/push" --steps 541
wait

python - "$work" <<'PYTHON'
import sys

import torch

import fastvid

digits = fastvid.load(f"{sys.argv[1]}/digits")
digits.standing_statistics()  # those of the averaged weights
digits.save(f"{sys.argv[1]}/dvdgan", torch.float16)
arm = fastvid.load(f"{sys.argv[1]}/arm")
clips = fastvid.data.open_clips(f"{sys.argv[1]}/push", split="train")
given = [clips.read(i, 0, 4, (32, 32)) for i in range(0, len(clips), 8)]  # each [4, 32, 32, 3]
arm.standing_statistics(given=torch.stack(given).movedim(-1, 1) / 127.5 - 1)
arm.save(f"{sys.argv[1]}/dvdgan-push", torch.float16)
PYTHON

fastvid evaluate --model "$work/dvdgan" --data 'digits?count=1' --clips 128 --json "$work/dvdgan.json"
fastvid evaluate --model "$work/dvdgan-push" --data "$work/push" --clips 128 --json "$work/dvdgan-push.json"
