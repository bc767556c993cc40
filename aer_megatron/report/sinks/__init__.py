"""Where the records of a run go beside metrics.jsonl: one file for each kind of place."""
