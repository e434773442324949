#!/bin/bash
set -e
mkdir -p "$2"
to=$(cd "$2" && pwd)
cd "$1"
find . -name '*.txt' -print0 | while IFS= read -r -d '' file; do
    mkdir -p "$to/$(dirname "$file")"
    cp "$file" "$to/$file"
done
