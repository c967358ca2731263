#!/bin/sh
# Compress a model, score it beside its source, hold it against gates and against the last report
# that was committed. What the workflow does; runs anywhere, and with the defaults offline.
#
#   examples/ci/compress.sh [options of `unicomp run`, as --set stages.0.bits=3]
#
#   RECIPE    a shipped recipe or a file                       (quickstart)
#   MODEL     the source: a folder, a Hub id, or a builtin     (builtin:tinyworld)
#   TEXT      what both are scored on: a file, or a builtin    (builtin:tinyworld)
#   GATES     what must hold beside the source                 (gates.yaml, beside this file)
#   BASELINE  the committed report; empty: compare with none   (baseline.json, beside this file)
#   LIMIT     score at most so many windows                    (all)
#   OUT       where everything goes                            (out/ci)
#   UNICOMP   the command                                      (unicomp)
#
# Exit codes are those of unicomp: 0 all kept, 3 something is worse, 4 too little evidence to tell,
# 1 an error that you can mend.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
recipe=${RECIPE:-quickstart}
model=${MODEL:-builtin:tinyworld}
text=${TEXT:-builtin:tinyworld}
gates=${GATES:-$here/gates.yaml}
baseline=${BASELINE-$here/baseline.json}
out=${OUT:-out/ci}
unicomp=${UNICOMP:-unicomp}

if [ -n "$baseline" ] && [ ! -f "$baseline" ]; then
    echo "error: \`$baseline\` is not there" >&2
    echo "hint: commit a report that a run wrote, or set \`BASELINE=\` for none" >&2
    exit 1
fi
mkdir -p "$out"
# What an earlier run left must not pass for this one's.
rm -f "$out/run.json" "$out/gates.xml" "$out/baseline.xml" "$out/summary.md" "$out/scorecard.html"

echo "compress: $recipe, $model" >&2
"$unicomp" run "$recipe" "$model" --out "$out/model" --overwrite --quiet --json "$@" >"$out/run.json"
"$unicomp" verify "$out/model" >&2

echo "score: $gates" >&2
gated=0
"$unicomp" score "$out/model" --baseline "$model" --text "$text" ${LIMIT:+--limit "$LIMIT"} \
    --gate "$gates" --out "$out/model/report.json" --junit "$out/gates.xml" \
    --html "$out/scorecard.html" --quiet >&2 || gated=$?
case $gated in 0 | 3 | 4) ;; *) exit "$gated" ;; esac

compared=0
python3 "$here/summary.py" "$out" ${baseline:+"$baseline"} || compared=$?
cat "$out/summary.md"
for code in "$gated" "$compared"; do
    case $code in 0 | 3 | 4) ;; *) exit "$code" ;; esac
done
for code in 3 4; do
    if [ "$gated" = "$code" ] || [ "$compared" = "$code" ]; then exit "$code"; fi
done
