"""JPEGs without decoding all of them: what their headers hold, and the part that a crop needs.

header    the size of an image, how it is stored, and how a viewer turns it
region    decodes a part with nvImageCodec, if it is installed
seekable  cuts the part out of a file that `prepare --seekable` has written, so that any decoder decodes it alone
scales    decodes all of a file at 1, 1/2, 1/4 or 1/8 of its scale; the scales that a huge one allows
crops     a JPEG that decodes each crop by the fastest of these ways
"""
