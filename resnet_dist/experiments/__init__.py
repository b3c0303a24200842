"""The runs of a tracker as a person reads them in a terminal. Knows no MLflow: values come in, text and JSON go out.

numbers  metrics, times and states in words
curves   curves of block characters
listing  many runs as a table, the best first
details  one run: what it is, what it reached, where things are
compare  several runs side by side
"""
