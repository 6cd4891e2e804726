#!/usr/bin/env bash
# mdiff on GKE through xpk:  CLUSTER=c PROJECT=p ZONE=z IMAGE=i WORKDIR=gs://BUCKET/run launch/xpk.sh NAME
# xpk writes a JobSet like jobset.yaml; the hosts of a slice, and slices, find each other.
set -eu

NAME=${1:?the name of the job}
shift
CLUSTER=${CLUSTER:?the GKE cluster}
PROJECT=${PROJECT:?its project}
ZONE=${ZONE:?its zone}
IMAGE=${IMAGE:?built from launch/Dockerfile}
WORKDIR=${WORKDIR:?gs://BUCKET/FOLDER: hosts share no disk}
TPU_TYPE=${TPU_TYPE:-v5litepod-16}
SLICES=${SLICES:-1}

# resumable.sh exits 143 when a preemption made mdiff save and stop; then xpk starts the job again.
xpk workload create --workload="$NAME" --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" \
  --tpu-type="$TPU_TYPE" --num-slices="$SLICES" --docker-image="$IMAGE" \
  --max-restarts=50 --restart-on-exit-codes=143 --termination-grace-period-seconds=120 \
  --command="launch/resumable.sh mdiff train --config configs/faces.py --workdir '$WORKDIR' \
--processes.launch cluster$(printf ' %q' "$@")"
