"""The figures of a run: a PNG for the eye and a JSON file with the same numbers. Knows neither MLflow nor the run folder.

files        all figures of a run, by the names of their files
curves       loss, accuracy, rate and speed over the steps
confusions   which classes are taken for which
classes      the accuracy of the best and the worst classes
calibration  how often a probability is right
worst        the images that are most surely wrong
explained    an image, where in it the evidence for a class is, and its most probable classes
layers       the gradient of each layer over the steps
drawing      what they share: size, axes, PNG
"""
