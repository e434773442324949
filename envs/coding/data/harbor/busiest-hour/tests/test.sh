#!/bin/bash
if [ "$(tr -d '[:space:]' < /app/busiest.txt)" = "$(cat /tests/expected)" ]; then
    echo 1 > /logs/verifier/reward.txt
else
    echo 0 > /logs/verifier/reward.txt
fi
