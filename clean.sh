#!/usr/bin/env bash
# Deletes what runs and tests leave behind in this project; downloaded datasets stay unless --all.
#
#   ./clean.sh            list, ask, delete; without a terminal there is nobody to ask: list and delete
#   ./clean.sh --dry-run  list only
#   ./clean.sh --yes      list and delete without asking
#   ./clean.sh --all      the downloads in datasets/ as well (without a terminal only with --yes)
#
# While a run works here nothing is deleted, and a run that starts meanwhile waits. Nothing outside the folder of this script is touched, and nothing behind a symbolic link.
set -euo pipefail

root=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
datasets=datasets/Graphs yes=false dry_run=false

for option in "$@"; do
    case $option in
        --yes) yes=true ;;
        --dry-run) dry_run=true ;;
        --all) datasets=datasets ;;
        -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) echo "clean.sh: unknown option $option: use --dry-run, --yes, --all or --help." >&2; exit 2 ;;
    esac
done

cd -- "$root"
doomed=()
if [[ ! -t 0 && $datasets == datasets ]] && ! $yes; then
    echo "Kept: downloads in datasets/; without a terminal to ask on, --all needs --yes." >&2
    datasets=datasets/Graphs
fi

# A folder counts only if every part of its path is a real folder: eval/ goes, eval.py is none, links are left.
add_folder() {
    local folder=$1
    if [[ -L $folder || -L ${folder%%/*} ]]; then
        echo "Left alone: $folder is or lies behind a symbolic link; delete it by hand if you mean it." >&2
    elif [[ -d $folder ]]; then
        doomed+=("$folder")
    fi
}

# Process numbers of those that have a file open, as far as /proc tells.
users_of() {
    local link
    for link in /proc/[0-9]*/fd/*; do
        if [[ $link -ef $1 && $link != /proc/$$/* ]]; then
            link=${link#/proc/}
            echo "${link%%/*}"
        fi
    done 2>/dev/null | sort -un | paste -sd ' '
}

# Every run holds a shared lock on this file (locks.py): stop if there is one, else hold it alone until the end.
marker=.running
no_run_works_here() {
    local busy=false
    if [[ -L $marker || ( -e $marker && ! -f $marker ) ]]; then
        echo "Nothing deleted: $root/$marker is no plain file; remove it." >&2
        exit 1
    elif command -v flock >/dev/null; then
        exec 9>>"$marker"
        if flock -n 9; then trap 'rm -f -- "$marker"' EXIT; else busy=true; fi
    elif [[ -e $marker ]]; then
        busy=true
    fi
    if $busy; then
        local who
        who=$(exec 9>&-; users_of "$marker")
        echo "Nothing deleted: a run works in $root${who:+ (process $who)}; wait for it, or end it." >&2
        exit 1
    fi
}

for folder in checkpoints eval reports observability "$datasets"; do add_folder "$folder"; done
# find does not follow links; datasets/ is pruned because what was downloaded is not ours to tidy.
while IFS= read -r -d '' cache; do doomed+=("${cache#./}"); done < <(
    find . \( -name .venv -o -name .git -o -path ./datasets \) -prune -o \
        -type d \( -name __pycache__ -o -name .pytest_cache -o -name .ruff_cache -o -name .hypothesis \) \
        -prune -print0
)

if ((${#doomed[@]} == 0)); then
    echo "Nothing to delete in $root."
    exit 0
fi
echo "To delete in $root:"
du -sh -- "${doomed[@]}"
if $dry_run; then
    echo "Dry run: nothing deleted."
    exit 0
fi
no_run_works_here
if ! $yes && [[ -t 0 ]]; then
    read -r -p "Delete all of these? [y/N] " answer || answer=no
    if [[ $answer != [yY] && $answer != [yY][eE][sS] ]]; then
        echo "Nothing deleted."
        exit 1
    fi
fi
rm -rf -- "${doomed[@]}"
echo "Deleted."
