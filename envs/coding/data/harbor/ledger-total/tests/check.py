import csv
import json
import pathlib

totals: dict[str, int] = {}
for path in pathlib.Path(__file__).with_name("ledger").glob("*.csv"):
    with path.open() as file:
        for row in csv.DictReader(file):
            text = row["cents"]
            cents = -int(text[1:-1]) if text.startswith("(") else int(text)
            totals[row["account"]] = totals.get(row["account"], 0) + cents
expected = {account: cents for account, cents in sorted(totals.items()) if cents}
found = json.loads(pathlib.Path("/app/totals.json").read_text())
assert list(found.items()) == list(expected.items()), found
