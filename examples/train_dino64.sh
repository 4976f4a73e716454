#!/usr/bin/env bash
# Trains the shipped model dino64 from nothing: records the game, trains its three parts, assembles and measures them.
# About three hours on two CPU cores. An interrupted run goes on when the script is run again.
#
#     bash examples/train_dino64.sh [FOLDER]        needs fastvid on the path, and Chromium
set -euo pipefail
work=${1:-runs/dino64}

# the loop rounds differently with another number of threads, and two runs side by side want one each
train() {
    local kind=$1 out="$work/$1"
    shift
    local resume=()
    if [ -d "$out/checkpoint" ]; then resume=(--resume); fi
    fastvid train "$kind" --data "$work/data" --preset dino64 --out "$out" --threads 1 "$@" "${resume[@]}"
}

fastvid data make dino --out "$work/data" --split train --clips 1200 --frames 64
fastvid data make dino --out "$work/data" --split test --clips 256 --frames 64

train vqvae --steps 1400 --batch-size 8 --learning-rate 1e-3 --warmup 30 --ema-decay 0.995

prior=(--vqvae "$work/vqvae" --every 8 --batch-size 16 --learning-rate 1.5e-3 --warmup 100 --ema-decay 0.998)
train top "${prior[@]}" --steps 2600 &
train bottom "${prior[@]}" --steps 2600
wait $!

fastvid assemble --vqvae "$work/vqvae" --top "$work/top" --bottom "$work/bottom" --half -o "$work/model"
fastvid evaluate --model "$work/model" --data "$work/data" --sheet "$work/predictions.png" --json "$work/figures.json"
