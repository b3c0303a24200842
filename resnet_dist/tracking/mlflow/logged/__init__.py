"""The files of a logged model: they hold all that predictions need, and nothing of the machine that wrote them.

write  write the files in MLflow's format
card   the README.md among them
serve  the code that MLflow runs to serve the model; it is copied with it
"""
