"""JPEGs without decoding all of them: what their headers hold, and the part that a crop needs.

header    the size of an image, how it is stored, and how a viewer turns it
region    decodes a part with nvImageCodec, if it is installed
seekable  cuts the part out of a file that `prepare --seekable` has written, so that any decoder decodes it alone
"""
