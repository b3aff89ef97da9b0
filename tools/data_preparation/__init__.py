"""Public data sets and reasoning traces, brought into the columns that this project reads."""
