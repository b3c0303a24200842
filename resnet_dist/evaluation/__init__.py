"""The evaluation of a trained model by the command `evaluate`: in this process, or in shares on a Ray cluster.

job     what a share needs and returns: the sums of whole steps, so that every cut gives the same
run     cut the set into shares, join what they return
robust  the same images under corruptions: their views, and the table
report  a folder with the result, and the figures
"""
