"""Benchmarks: run by hand with ``make bench``; results are in results/. No test runs them."""
