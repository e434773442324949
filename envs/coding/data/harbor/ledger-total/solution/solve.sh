#!/bin/bash
python3 - <<'PY'
import csv, glob, json
totals = {}
for path in glob.glob("ledger/*.csv"):
    for row in csv.DictReader(open(path)):
        text = row["cents"]
        cents = -int(text[1:-1]) if text.startswith("(") else int(text)
        totals[row["account"]] = totals.get(row["account"], 0) + cents
json.dump({name: cents for name, cents in sorted(totals.items()) if cents}, open("totals.json", "w"))
PY
