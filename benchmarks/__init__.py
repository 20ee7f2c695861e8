"""Benchmarks: run by hand (``make bench``), results committed under results/. No test runs them."""
