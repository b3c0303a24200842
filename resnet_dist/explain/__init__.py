"""Where a network looks: pictures of what speaks for a class in an image.

grad_cam  class-activation maps by gradients
run       images in, a picture beside each out
"""
