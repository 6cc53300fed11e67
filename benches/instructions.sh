#!/usr/bin/env bash
# Instructions of one span's whole life, rung by rung, counted by callgrind: the difference between N and 2N spans,
# so that what is done once cancels out. Only the calling thread's count. What the allocator takes depends on the
# heap's history as well, by a hundred instructions from run to run, and is therefore told apart.
#
# benches/instructions.sh [--csv <file>] [<rung>...]: the rungs to count, all of them without any.
set -euo pipefail
cd "$(dirname "$0")/.."

csv=/dev/null
if [[ ${1:-} == --csv ]]; then
    csv=$(realpath -m "$2")
    shift 2
fi
count=${COUNT:-5000}
built() { # cargo's options
    cargo bench --bench spans "$@" --no-run --message-format=json |
        sed -n 's/.*"name":"spans".*"executable":"\([^"]*\)".*/\1/p'
}
spans=$(built --all-features)
profiles=$(mktemp -d)
trap 'rm -rf "$profiles"' EXIT
rungs=("$@")
((${#rungs[@]})) || rungs=(
    registry plain-untagged ours-untagged plain-entered ours-entered plain-tagged ours-tagged-miss
    ours-tagged-miss-redb ours-tagged-hit ours-tagged-nested ours-tagged-foreign ours-hit-backend ours-hit-bounded
    plain-run ours-hit-run plain-api ours-hit-api ours-replayed plain-recorded ours-recorded-hit plain-attached
    plain-linked by-hand by-hand-cached store store-redb rooted-untagged rooted-tagged-hit rooted-tagged-miss
    lto-plain-untagged lto-ours-untagged lto-plain-tagged lto-ours-tagged-hit
)
# Rungs that begin with `lto-` are counted in a build with fat LTO and one codegen unit.
if [[ " ${rungs[*]}" == *" lto-"* ]]; then
    spans_lto=$(CARGO_TARGET_DIR=target/lto CARGO_PROFILE_BENCH_LTO=fat CARGO_PROFILE_BENCH_CODEGEN_UNITS=1 built --features durable-root)
fi

# Of so many spans of a rung: all instructions of the main thread, and those of the allocator.
collect() {
    local profile=$profiles/callgrind.$1.$2 program=$spans
    [[ $1 != lto-* ]] || program=$spans_lto
    valgrind --tool=callgrind --separate-threads=yes --callgrind-out-file="$profile" --compress-strings=no \
        "$program" "${1#lto-}" "$2" >&/dev/null
    awk '
        /^fn=/ { allocator = /^fn=(malloc|free|calloc|realloc|_int_|unlink_chunk|alloc_perturb|sysmalloc|systrim)/ }
        /^calls=/ { getline; next }
        /^[-+*0-9]/ && NF == 2 { all += $2; if (allocator) part += $2 }
        END { print all, part }' "$profile-01"
    rm -f "$profile"*
}

# Both counts of a rung, into a file of its name.
count_rung() { # rung
    echo "$(collect "$1" "$count") $(collect "$1" $((2 * count)))" >"$profiles/$1"
}

# As many at once as there are cores: counts do not depend on the load.
for rung in "${rungs[@]}"; do
    (($(jobs -rp | wc -l) < $(nproc))) || wait -n
    count_rung "$rung" &
done
wait

declare -A all allocator
[[ -s $csv ]] || echo 'bench,case,size,threads,subject,unit,median,best,ratio' >>"$csv"
printf '%-22s %12s %18s\n' 'per span' instructions 'in the allocator'
for rung in "${rungs[@]}"; do
    read -r all_once allocator_once all_twice allocator_twice <"$profiles/$rung"
    all[$rung]=$(((all_twice - all_once) / count))
    allocator[$rung]=$(((allocator_twice - allocator_once) / count))
    printf '%-22s %12d %18d\n' "$rung" "${all[$rung]}" "${allocator[$rung]}"
    echo "instructions,$rung,,1,$rung,instructions,${all[$rung]},$((all[$rung] - allocator[$rung]))," >>"$csv"
done

# A comparison, if all of its rungs were counted: with the allocator, without it, and the target.
compare() { # name, what, target, expression over rung names
    local name=$1 what=$2 target=$3 expression=$4 with=$4 without=$4 rung ratios
    # The longest names first, since some begin with others.
    for rung in $(grep -o '[a-z-]*[a-z]' <<<"$expression" | sort -ru); do
        [[ ${all[$rung]:-} ]] || return 0
        with=${with//"$rung"/"${all[$rung]}"}
        without=${without//"$rung"/"(${all[$rung]} - ${allocator[$rung]})"}
    done
    ratios=$(awk "BEGIN { printf \"%.4f %.4f\", $with, $without }")
    printf '%-52s %s  without the allocator %s  target %s\n' "$what" "${ratios% *}" "${ratios#* }" "$target"
    echo "instructions,$name,,1,ratio,,${ratios% *},${ratios#* }," >>"$csv"
}

echo
compare untagged 'untagged: ours / plain' 1.010 'ours-untagged / plain-untagged'
compare entered 'one entry and exit, untagged: ours / plain' 1.005 'ours-entered / plain-entered'
compare hit 'tagged, hit: ours / plain' 1.12 'ours-tagged-hit / plain-tagged'
compare hit-backend 'with a backend: ours / plain' 1.16 'ours-hit-backend / plain-tagged'
compare hit-bounded 'with max_spans and max_age: ours / plain' 1.16 'ours-hit-bounded / plain-tagged'
compare hit-run 'with a run id: ours / plain' 1.16 'ours-hit-run / plain-run'
compare hit-api 'through the OpenTelemetry API: ours / plain' 1.16 'ours-hit-api / plain-api'
compare added-best 'added to a tagged span: ours / best by hand' 1.15 \
    '(ours-tagged-hit - plain-tagged) / (by-hand-cached - plain-tagged)'
compare added 'added to a tagged span: ours / by hand' none \
    '(ours-tagged-hit - plain-tagged) / (by-hand - plain-tagged)'
compare foreign 'out of another trace: ours / plain with a link' 1.25 'ours-tagged-foreign / plain-linked'
compare nested 'within a span of its instance: ours / plain' none 'ours-tagged-nested / plain-tagged'
compare first 'first span of an instance: ours / plain' none 'ours-tagged-miss / plain-tagged'
compare late 'id recorded later: ours / plain' none 'ours-recorded-hit / plain-recorded'
compare replayed 'replayed: ours / plain' none 'ours-replayed / plain-tagged'
compare rooted 'durable roots, hit: ours / plain' none 'rooted-tagged-hit / plain-tagged'
compare rooted-first 'durable roots, first span: ours / plain' none 'rooted-tagged-miss / plain-tagged'
compare rooted-untagged 'durable roots, untagged: ours / plain' none 'rooted-untagged / plain-untagged'
compare lto-untagged 'fat LTO, untagged: ours / plain' none 'lto-ours-untagged / lto-plain-untagged'
compare lto-hit 'fat LTO, tagged, hit: ours / plain' none 'lto-ours-tagged-hit / lto-plain-tagged'
compare redb-span 'first span of an instance: with redb / without' none 'ours-tagged-miss-redb / ours-tagged-miss'
compare redb-store 'store: with redb / without' 1.6 'store-redb / store'
