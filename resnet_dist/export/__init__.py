"""A trained model as a file for other programs, compared with its source before the file appears.

formats   what is written for each format, and how the file is run again
samples   the images that it is compared on
run       write, compare and publish one file
quantize  the same for 8-bit integers, with the accuracy before and after
"""
