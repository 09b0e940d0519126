"""What the library costs, as ratios to the raw driver doing the same work in the same run: ``python -m benchmarks``."""
