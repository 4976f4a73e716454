#!/usr/bin/env bash
# Trains the shipped model push64 from nothing: films a simulated arm, trains the model's parts, assembles and
# measures them. About two and a half hours on two CPU cores. An interrupted run goes on when the script is run again.
#
#     bash examples/train_push64.sh [FOLDER]        needs fastvid on the path, and pybullet (Python 3.11 or older)
set -euo pipefail
work=${1:-runs/push64}

train() {  # run folder, what to train, options
    local out="$work/$1" kind=$2
    shift 2
    local resume=()
    if [ -d "$out/checkpoint" ]; then resume=(--resume); fi
    fastvid train "$kind" --data "$work/data" --out "$out" "$@" "${resume[@]}"
}

fastvid data make push --out "$work/data" --split train --clips 2000 --workers 2
fastvid data make push --out "$work/data" --split test --clips 256 --workers 2

# another number of threads rounds differently
train vqvae vqvae --preset push64 --threads 2 --steps 1600 --batch-size 8 --learning-rate 1e-3 --warmup 30 --ema-decay 0.995

# the decoder, further: over the fixed scene, then sharper (needs the weights of LPIPS: fastvid weights list)
decoder=(--threads 1 --steps 500 --warmup 20 --ema-decay 0.99 --size 64)
train decoder decoder --vqvae "$work/vqvae" --scene "${decoder[@]}" --batch-size 8 --learning-rate 1e-3
train sharp decoder --vqvae "$work/decoder" --perceptual 0.3 "${decoder[@]}" --batch-size 4 --learning-rate 5e-4

prior=(--preset push64 --threads 1 --vqvae "$work/vqvae" --batch-size 16 --learning-rate 1.5e-3 --warmup 100 --ema-decay 0.998)
train top top "${prior[@]}" --steps 2400 &
train bottom bottom "${prior[@]}" --steps 2400
wait $!

fastvid assemble --vqvae "$work/sharp" --top "$work/top" --bottom "$work/bottom" --half -o "$work/model"
fastvid evaluate --model "$work/model" --data "$work/data" --sheet "$work/predictions.png" --json "$work/figures.json"
