#!/usr/bin/env bash
# Runs a command and passes SIGTERM on to it. A command that was so asked to stop and exits 0 is reported as 143:
# mdiff has saved but is not done, and whoever restarts failed jobs shall start it again.
#
#   launch/resumable.sh mdiff train --config configs/faces.py --workdir gs://BUCKET/run
set -u

asked="" passed="" child=""
pass_on() { # once: a second SIGTERM would end the command without a save
  asked=yes
  if [[ -n $child && -z $passed ]]; then
    passed=yes
    kill -TERM "$child"
  fi
}
trap pass_on TERM
"$@" &
child=$!
[[ -z $asked ]] || pass_on # asked before there was a child
while :; do
  wait "$child" # is also over when the trap has run
  code=$?
  kill -0 "$child" 2> /dev/null || break
done

if [[ -n $asked && $code -eq 0 ]]; then
  exit 143
fi
exit "$code"
