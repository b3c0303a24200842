"""Commands that train several runs which belong together.

sweep  trials of one recipe with other values of some fields
"""
