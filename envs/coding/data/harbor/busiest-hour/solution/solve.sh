#!/bin/bash
grep ' 200$' access.log | cut -c12-13 | sort | uniq -c | sort -k1,1nr -k2,2n | head -1 | awk '{print $2}' > busiest.txt
