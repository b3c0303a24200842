"""Commands that train.

train   one recipe
study   the recipes of a study, one after another
sweep   trials of one recipe with other values of some fields
ending  what they print at their end, and the exit code for what was left out
"""
