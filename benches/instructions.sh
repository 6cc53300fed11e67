#!/usr/bin/env bash
# Instructions of one span's whole life, rung by rung, counted by callgrind: the difference between N and 2N spans,
# so that what is done once cancels out. What the allocator takes depends on the heap's history as well, by a
# hundred instructions from run to run, and is therefore told apart.
# Arguments: the rungs to count, all of them without any.
set -euo pipefail
cd "$(dirname "$0")/.."

count=${COUNT:-5000}
spans=$(cargo bench --bench spans --all-features --no-run --message-format=json |
    sed -n 's/.*"name":"spans".*"executable":"\([^"]*\)".*/\1/p')
profile=$(mktemp)
trap 'rm -f "$profile"' EXIT
rungs=("$@")
((${#rungs[@]})) || rungs=(
    registry plain-untagged ours-untagged plain-tagged ours-tagged-miss ours-tagged-hit ours-tagged-nested
    ours-tagged-foreign plain-recorded ours-recorded-hit plain-attached by-hand
)

# Of so many spans of a rung: all instructions, and those of the allocator.
collect() {
    valgrind --tool=callgrind --callgrind-out-file="$profile" --compress-strings=no "$spans" "$1" "$2" >&/dev/null
    awk '
        /^fn=/ { allocator = /^fn=(malloc|free|calloc|realloc|_int_|unlink_chunk|alloc_perturb|sysmalloc|systrim)/ }
        /^calls=/ { getline; next }
        /^[-+*0-9]/ && NF == 2 { all += $2; if (allocator) part += $2 }
        END { print all, part }' "$profile"
}

declare -A all allocator
printf '%-22s %12s %18s\n' 'per span' instructions 'in the allocator'
for rung in "${rungs[@]}"; do
    read -r all_once allocator_once <<<"$(collect "$rung" "$count")"
    read -r all_twice allocator_twice <<<"$(collect "$rung" $((2 * count)))"
    all[$rung]=$(((all_twice - all_once) / count))
    allocator[$rung]=$(((allocator_twice - allocator_once) / count))
    printf '%-22s %12d %18d\n' "$rung" "${all[$rung]}" "${allocator[$rung]}"
done

# A comparison, if all of its rungs were counted: with the allocator, without it, and the target.
compare() { # what, target, expression over rung names
    local what=$1 target=$2 expression=$3 with=$3 without=$3 rung
    for rung in $(grep -o '[a-z-]*[a-z]' <<<"$expression"); do
        [[ ${all[$rung]:-} ]] || return 0
        with=${with//"$rung"/"${all[$rung]}"}
        without=${without//"$rung"/"(${all[$rung]} - ${allocator[$rung]})"}
    done
    awk "BEGIN { printf \"%-40s %.4f  without the allocator %.4f  target %s\\n\", \"$what\", $with, $without, \"$target\" }"
}

echo
compare 'untagged: ours / plain' 1.005 'ours-untagged / plain-untagged'
compare 'tagged, hit: ours / plain' 1.05 'ours-tagged-hit / plain-tagged'
compare 'added to a tagged span: ours / by hand' 0.08 \
    '(ours-tagged-hit - plain-tagged) / (by-hand - plain-tagged)'
