#!/bin/bash
python3 /tests/check.py && echo 1.0 > /logs/verifier/reward.txt || echo 0.0 > /logs/verifier/reward.txt
