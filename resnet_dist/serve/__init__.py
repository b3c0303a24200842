"""Answer over HTTP: MLflow's scoring server, with a route for the bytes of images and a page to drop them onto.

run      start the server on a port that is free, and end it
app      the routes
body     the body of a request: its limits, and the images in it
batches  one thread that computes: requests that wait share a forward pass
page.html  the page at /
"""
