"""The work on images that a GPU does: the same numbers as on a CPU.

codec   decodes boxes of JPEGs, many at once
resize  shrink or enlarge images by whole numbers, to the bytes of the CPU's resizing
"""
