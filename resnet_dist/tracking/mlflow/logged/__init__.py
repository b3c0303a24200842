"""Models in MLflow: the files of one hold all that predictions need, and nothing of the machine that wrote them.

lookup     find a logged model in a store by what a person calls it
write      write the files in MLflow's format
card       the README.md among them
kept       the checkpoints of a run, as its journal and its folder have them
reference  checkpoints as models without files, which name the place of their weights
scoring    a model loaded for MLflow's scoring server, which `resnet-dist serve` runs
serve      the code that MLflow runs to serve the model; it is copied with it
smoke      a program that loads a model as a stranger does
"""
