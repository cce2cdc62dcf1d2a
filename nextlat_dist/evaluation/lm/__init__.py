"""`nextlat evaluate lm`: benchmarks of language models, by lm-evaluation-harness."""
