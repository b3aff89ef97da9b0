"""Reading and rendering: problems, given answers, the order of prompts, the arithmetic task."""
