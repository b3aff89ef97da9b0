"""Scoring answers: grading, pass@k, confidence intervals, the evaluator."""
