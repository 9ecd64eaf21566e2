"""Benchmarks and cost estimates: python -m benchmarks.<name> --help. Results are in results/."""
