#!/usr/bin/env bash
# Every student of the comparison, one after the other, in benchmarks/papercut: three hours on one CPU core up to
# work/kept, 75 minutes on two cores for the three that end in the student that ships, and the consistency student.
set -euo pipefail
warm=(tiue distill --config runs/warm.yaml --prompts prompts.txt)
distill=(tiue distill --config runs/distill.yaml --prompts prompts_balanced.txt)

"${warm[@]}" --out work/warm
"${distill[@]}" --out work/tiue
"${distill[@]}" --out work/no-kl --set kl.weight=0
"${distill[@]}" --out work/no-warm-start --set student.init=null
"${warm[@]}" --out work/one-step-warm --set student.steps=1
"${distill[@]}" --out work/one-step --set student.steps=1 --set student.init=work/one-step-warm/student
for spacing in trailing leading; do
    "${warm[@]}" --out work/$spacing-400 --set student.spacing=$spacing --set warm_start.steps=400 --set max_steps=400
done
tiue distill --config runs/kept.yaml --prompts prompts_balanced.txt --out work/kept
tiue distill --config runs/warm_longer.yaml --prompts prompts.txt --out work/warm-longer
tiue distill --config runs/distill_longer.yaml --prompts prompts_balanced.txt --out work/longer
tiue distill --config runs/distill_last.yaml --prompts prompts_balanced.txt --out work/last
# Fewer pairs as data, the rest of the same teacher evaluations in its own steps.
python train_lcm.py --config runs/warm.yaml --pairs 10240 --steps 1500 --out work/lcm
python compare.py runs/methods.yaml --name comparison
