"""Parts of bench_grading.py."""
