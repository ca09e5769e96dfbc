#!/usr/bin/env bash
# Deletes what runs and tests leave behind in this project; downloaded datasets stay unless --all.
#
#   ./clean.sh            list, ask, delete
#   ./clean.sh --dry-run  list only
#   ./clean.sh --yes      list and delete without asking
#   ./clean.sh --all      the downloads in datasets/ as well
#
# Nothing outside the folder of this script is touched, and nothing behind a symbolic link.
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

# A folder counts only if every part of its path is a real folder: eval/ goes, eval.py is none, links are left.
add_folder() {
    local folder=$1
    if [[ -L $folder || -L ${folder%%/*} ]]; then
        echo "Left alone: $folder is or lies behind a symbolic link; delete it by hand if you mean it." >&2
    elif [[ -d $folder ]]; then
        doomed+=("$folder")
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
if ! $yes; then
    if [[ ! -t 0 ]]; then
        echo "Nothing deleted: there is no terminal to ask on; run ./clean.sh --yes to delete without asking." >&2
        exit 1
    fi
    read -r -p "Delete all of these? [y/N] " answer || answer=no
    if [[ $answer != [yY] && $answer != [yY][eE][sS] ]]; then
        echo "Nothing deleted."
        exit 1
    fi
fi
rm -rf -- "${doomed[@]}"
echo "Deleted."
