#!/usr/bin/env bash
# Memorization against the ambient cutoff on 50 faces: every cutoff x seed, same steps, then one table.
# Usage: bench/cutoffs.sh OUT [STEPS] [SEEDS]    (about 3 minutes a run on one core; resumes where it stopped)
set -euo pipefail
out=${1:?folder for the runs}
steps=${2:-1500}
seeds=${3:-0 1}
here=$(cd "$(dirname "$0")/.." && pwd)
for seed in $seeds; do
  for cutoff in 0 0.5 1 2 4; do
    run=$out/cutoff$cutoff-seed$seed
    [ -f "$run/report.json" ] && continue
    python "$here/train.py" --config "$here/configs/faces.py" --workdir "$run" --name "cutoff$cutoff-seed$seed" \
      --seed "$seed" --loss.cutoff "$cutoff" --train.steps "$steps"
    python "$here/eval.py" --workdir "$run"
  done
done
