"""What a run tells its user: metrics.jsonl, TensorBoard events, the live display, report.png and run.json."""
