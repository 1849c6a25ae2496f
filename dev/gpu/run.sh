#!/usr/bin/env bash
# On a GPU machine without network, in the checkout's root with .device beside it:
#     bash dev/gpu/run.sh [arguments of `python3 dev gpu`]
# OUT: where the results go. KIT_PYTHON: another python3, which has all packages. KIT_TMP: scratch.
set -uo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
export OUT=${OUT:-/tmp/out} KIT_TMP=${KIT_TMP:-/tmp/kit}
python=${KIT_PYTHON:-python3}
mkdir -p "$OUT"
SECONDS=0
say() { echo "[$SECONDS s] $*" | tee -a "$OUT/tables.txt"; }

rm -rf "$KIT_TMP/site" "$KIT_TMP/host"
mkdir -p "$KIT_TMP/host/0.30.0"
tar --no-same-owner -xJf "$root/.device/ComfyUI.tar.xz" -C "$KIT_TMP/host/0.30.0" & unpack=$!
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
if [ -z "${KIT_PYTHON:-}" ]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target \
        "$KIT_TMP/site" "$root"/.device/wheels/*.whl 2>&1 | tee -a "$OUT/log.txt"
    export PYTHONPATH=$KIT_TMP/site:$root/dev/gpu/stubs
fi
wait $unpack || { say "ComfyUI could not be unpacked"; exit 2; }
# The command's environment is this machine's own; in that variable it finds ComfyUI.
export LCM_LORA_DEV_HOST=$KIT_TMP/host/0.30.0/ComfyUI LCM_LORA_CACHE=$KIT_TMP/cache
export HF_HUB_OFFLINE=1 DO_NOT_TRACK=1 no_proxy=127.0.0.1
say "installed"
"$python" "$root/dev" gpu --out "$OUT" --work "$KIT_TMP/work" "$@" 2>&1 | tee -a "$OUT/tables.txt"
status=${PIPESTATUS[0]}
say "ended with $status"
exit "$status"
