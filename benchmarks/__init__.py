"""Programs that measure or reckon: python -m benchmarks.<name> --help. Results lie in results/."""
