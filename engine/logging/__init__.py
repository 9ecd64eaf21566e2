"""Log of the main process: terminal, log.txt, metrics.jsonl, trackers."""
