"""Augmentation policies on one image, by draws that come from the sample's identity.

apply.py        the operations that an image gets, and the color jitter
spaces.py       the operations that each policy chooses from, and their strengths
operations.py   the operations, on a tensor or on an image of Pillow
"""
