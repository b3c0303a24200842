"""Studies: several runs that answer one question, with a figure, a table and a conclusion.

request  the request of a person to run a study, and the request to train each of its runs
run      train the runs one after another; resume a study that was interrupted
report   reduce the metrics of the runs to results, and write figure and table
figure   draw the figure
"""
