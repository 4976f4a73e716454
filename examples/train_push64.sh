#!/usr/bin/env bash
# Trains the shipped model push64 from nothing: films a simulated arm, trains the model's three parts, assembles and
# measures them. About two and a half hours on two CPU cores. An interrupted run goes on when the script is run again.
#
#     bash examples/train_push64.sh [FOLDER]        needs fastvid on the path, and pybullet (Python 3.11 or older)
set -euo pipefail
work=${1:-runs/push64}

train() {
    local kind=$1 out="$work/$1"
    shift
    local resume=()
    if [ -d "$out/checkpoint" ]; then resume=(--resume); fi
    fastvid train "$kind" --data "$work/data" --preset push64 --out "$out" "$@" "${resume[@]}"
}

fastvid data make push --out "$work/data" --split train --clips 2000 --workers 2
fastvid data make push --out "$work/data" --split test --clips 256 --workers 2

# another number of threads rounds differently
train vqvae --threads 2 --steps 1600 --batch-size 8 --learning-rate 1e-3 --warmup 30 --ema-decay 0.995

prior=(--threads 1 --vqvae "$work/vqvae" --batch-size 16 --learning-rate 1.5e-3 --warmup 100 --ema-decay 0.998)
train top "${prior[@]}" --steps 2400 &
train bottom "${prior[@]}" --steps 2400
wait $!

fastvid assemble --vqvae "$work/vqvae" --top "$work/top" --bottom "$work/bottom" --half -o "$work/model"
fastvid evaluate --model "$work/model" --data "$work/data" --sheet "$work/predictions.png" --json "$work/figures.json"
