"""Augmentation policies on one image, by draws that come from the sample's identity.

apply       the operations that an image gets, and the color jitter
spaces      the operations that each policy chooses from, and their strengths
operations  the operations, on a tensor or on an image of Pillow
"""
