"""MLflow's page: served, linked, and opened with the columns and charts that answer which run is best.

serve  serve a store to a browser, or name the server that does
view   the saved view of an experiment: its columns, their order, and its charts
app    MLflow's server with faster static files and fewer garbage collections
links  the addresses of an experiment and of a run
"""
