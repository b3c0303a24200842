"""Corruptions of images in five severities, after ImageNet-C (Hendrycks & Dietterich 2019, arXiv 1903.12261).

They tell how a model does on pictures that are noisy, blurred, foggy or compressed. They are computed on the fly from
the pixels that evaluation sees, and by the sample's id alone: the same on every machine and any number of ranks.

table    all corruptions by name, with their strengths
chance   the random draws of one sample
noise    gaussian, shot and impulse noise
blur     defocus, motion and zoom blur
weather  fog, snow, brightness
digital  contrast, pixelation, JPEG
warp     glass blur, elastic transform

Shapes in all of them: S image size, C channels; images are float32 in 0..1 with (S, S, C).
"""
