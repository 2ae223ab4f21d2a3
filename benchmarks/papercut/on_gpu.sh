#!/usr/bin/env bash
# All of papercut's trainings on one GPU, within a budget of seconds: the teacher first, then many students of it.
#
#     bash benchmarks/papercut/on_gpu.sh teacher      # scenes, autoencoder, teacher: about six minutes
#     bash benchmarks/papercut/on_gpu.sh students     # students and adapters of the tables, the checker beside them: five
#
# PAPERCUT_WORK is where everything lies (work/ without it), OUT where the results are packed to. AUTOENCODER_S,
# TEACHER_S and STUDENTS_S are the budgets. Where CUDA's multi-process service starts, the students share the GPU
# through it; else fewer of them run at once.
set -uo pipefail
cd "$(dirname "$0")"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PAPERCUT_WORK=${PAPERCUT_WORK:-$PWD/work}
export PYTHONPATH="$PWD/../..${PYTHONPATH:+:$PYTHONPATH}"
work=$PAPERCUT_WORK out=${OUT:-$PAPERCUT_WORK/packed}
mkdir -p "$work" "$out"
python=${PYTHON:-python3}
say() { echo "=== $SECONDS s: $*"; }

train_teacher() {
    OMP_NUM_THREADS=1 "$python" -W ignore on_gpu.py draw >"$work/draw.txt" 2>&1 &
    "$python" -W ignore checkpoints.py take
    TOKENIZERS_PARALLELISM=true "$python" -W ignore on_gpu.py teacher --seconds "${TEACHER_S:-160}" >"$work/teacher.txt" 2>&1 &
    local teacher=$!
    "$python" -W ignore on_gpu.py autoencoder --seconds "${AUTOENCODER_S:-105}" 2>&1 | tee "$work/autoencoder.txt"
    say "scenes: $(cat "$work/draw.txt")"
    wait $teacher
    say "teacher ended with $?"
    tail -30 "$work/teacher.txt"
    "$python" -W ignore package.py --out "$work/teacher" && "$python" -W ignore make_prompts.py --world
    tar -C "$work" -cf "$out/teacher.tar" teacher vae guidance.txt teacher.png autoencoder.log.jsonl teacher.log.jsonl
}

train_students() {
    local seconds=${STUDENTS_S:-270} parallel=5 share=100
    export TOKENIZERS_PARALLELISM=false CUDA_MPS_PIPE_DIRECTORY=/tmp/papercut-mps CUDA_MPS_LOG_DIRECTORY=/tmp/papercut-mps
    mkdir -p "$CUDA_MPS_PIPE_DIRECTORY"
    if nvidia-cuda-mps-control -d && timeout 40 "$python" -c "import torch; torch.ones(3).cuda().sum().item()"; then
        parallel=14 share=20
    else
        unset CUDA_MPS_PIPE_DIRECTORY
    fi
    say "$parallel at once"
    CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=$share "$python" -W ignore on_gpu.py checker --batch 192 \
        --seconds $((seconds - 60)) >"$work/checker.txt" 2>&1 &
    if [ "$share" -lt 100 ]; then
        CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=15 "$python" -W ignore on_gpu.py autoencoder --decoder-only --batch 32 \
            --seconds $((seconds - 60)) >"$work/decoder.txt" 2>&1 &
    fi
    "$python" -W ignore fleet.py --seconds "$seconds" --parallel "$parallel"
    say "students ended"
    sleep 3
    tail -3 "$work/checker.txt" "$work/decoder.txt" 2>/dev/null
    tar -C "$work" -cf "$out/rest.tar" vae checker.safetensors checker.log.jsonl
    split -b 16000000 -d "$work/fleet.tar" "$out/fleet.tar."
    [ -z "${CUDA_MPS_PIPE_DIRECTORY:-}" ] || echo quit | nvidia-cuda-mps-control
}

case ${1:-} in
teacher) train_teacher ;;
students) train_students ;;
*) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
say done
