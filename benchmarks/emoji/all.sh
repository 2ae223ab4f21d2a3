#!/usr/bin/env bash
# The emoji world from nothing to its table, one step after the other; what is finished is not done again.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
cd "$here"
export PAPERCUT_WORK="${EMOJI_WORK:-$here/work}" EMOJI_WORK="${EMOJI_WORK:-$here/work}"
share="${EMOJI_MINUTES:-1}" workers="${EMOJI_WORKERS:-2}"
minutes() { python -c "print($1 * $share)"; }
steps() { python -c "print(max(1, round($1 * $share)))"; }

[ -f "$EMOJI_WORK/images.npy" ] || python emoji_data.py
python ../papercut/train_autoencoder.py --data "$EMOJI_WORK" --latent-channels 16 --workers "$workers" --minutes "$(minutes 40)"
python train_clip.py --data "$EMOJI_WORK" --threads 1 --minutes "$(minutes 10)"
python ../papercut/train_teacher.py --data "$EMOJI_WORK" --widths 64 128 192 --workers "$workers" --minutes "$(minutes 90)"
[ -d "$EMOJI_WORK/teacher" ] || python ../papercut/package.py --out "$EMOJI_WORK/teacher"

student() {  # name, then settings
    [ -d "$EMOJI_WORK/$1/student" ] || tiue distill --config student.yaml --teacher "$EMOJI_WORK/teacher" --prompts "$EMOJI_WORK/prompts.txt" \
        --out "$EMOJI_WORK/$1" --set "warm_start.pairs=$(steps 16384)" --set "warm_start.steps=$(steps 2400)" --set "max_steps=$(steps 3200)" "${@:2}"
}
student k4
student k2 --set student.steps=2
student k1 --set student.steps=1
student regression --set "max_steps=$(steps 2400)"
python emoji_measure.py methods.yaml
