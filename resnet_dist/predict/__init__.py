"""Predictions of a trained model, for images that lie anywhere.

find        the MODEL of a command line: a folder, file, run, or model of MLflow → the place of its weights
unread      an image that is named, but not read yet
inputs      the PATHS of a command line → images to read: files, folders, patterns, URLs, stdin
shards      images inside tars
classify    images → class names and probabilities, through the loader's threads and decoders
cluster     the same by workers on a Ray cluster
rows        predictions as a table, as JSON or as CSV
thumbnails  small pictures as text, for the table
row_file    a file of rows that an interrupted command continues
"""
