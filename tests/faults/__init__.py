"""The fault matrix: faults of processes, links, disks and clocks at each moment of a request.

`make faults` runs it, and writes `results.json` beside this file and docs/faults.md.
"""
