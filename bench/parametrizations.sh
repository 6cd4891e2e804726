#!/usr/bin/env bash
# The demo's faces, network and steps under four processes, each with the prediction, times and weight usual for it.
# Usage: bench/parametrizations.sh OUT [STEPS]; two runs at a time, one core each.
set -euo pipefail
out=${1:?folder for the runs}
steps=${2:-1500}
mdiff=${MDIFF:-mdiff}
run() { # name, core, fields
  local name=$1 core=$2
  shift 2
  taskset -c "$core" "$mdiff" train --config configs/faces.py --workdir "$out/$name" --name "$name" --train.steps "$steps" "$@"
  taskset -c "$core" "$mdiff" eval --workdir "$out/$name" --probes audit quality
}
(
  run edm 0
  run v 0 --process.kind vp_cosine --net.prediction v --loss.times logsnr --loss.level-weight min_snr
) &
run eps 1 --process.kind vp_linear --net.prediction eps --loss.times uniform --loss.level-weight eps
run velocity 1 --process.kind flow --net.prediction velocity --loss.times logit_normal --loss.p-mean 0 --loss.p-std 1 --loss.level-weight velocity
wait
"$mdiff" report "$out"/{edm,v,eps,velocity} --out "$out" --title "Four parametrizations"
