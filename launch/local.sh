#!/usr/bin/env bash
# One host, all of its devices:
#   launch/local.sh search_r1_grpo[:SCALE] WORKDIR [--config.a.b=value ...]
# The same command continues a run that was stopped.  For several processes or hosts see the other files here.
set -euo pipefail
if [ $# -lt 2 ]; then
  sed -n '2,4s/^# //p' "$0" >&2
  exit 2
fi
workdir=$(realpath -m -- "$2")
method=$1
shift 2
cd "$(dirname "$0")/.."
scale=''
case $method in *:*) scale=:${method#*:} ;; esac
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" -m rlsearch.train --config="configs/${method%%:*}.py$scale" --workdir="$workdir" "$@"
