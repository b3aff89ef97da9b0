"""One HTML page about one run or several: figures, tables, nothing to fetch; and replays."""
