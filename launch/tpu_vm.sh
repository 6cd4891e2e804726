#!/usr/bin/env bash
# mdiff on all hosts of a TPU slice of TPU VMs:  TPU=name ZONE=zone WORKDIR=gs://BUCKET/run launch/tpu_vm.sh
# The hosts find each other; --processes.launch cluster insists on it. More options for mdiff train go behind.
set -eu

TPU=${TPU:?the name of the TPU VM}
ZONE=${ZONE:?its zone}
WORKDIR=${WORKDIR:?gs://BUCKET/FOLDER: hosts of a slice share no disk}
SOURCE=${SOURCE:-'mdiff[tpu,gcs]'} # what pip installs: a release, a wheel in a bucket, git+https://…
CONFIG=${CONFIG:-mdiff/configs/faces.py} # on the hosts

command="python3 -m pip install --quiet '$SOURCE' && mdiff train --config '$CONFIG' --workdir '$WORKDIR' \
--processes.launch cluster$(printf ' %q' "$@")"
# A preempted TPU is deleted: create it again, then run this again; training goes on from the last checkpoint.
gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$command"
