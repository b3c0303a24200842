"""Encoded bytes to pixels of the step's size, augmented by draws that depend on the sample's identity alone.

decode         reads the header of an image, then decodes the image or the part that a crop needs
formats        image formats by the first bytes of a file, and what a file is that holds no image
jpeg_header    reads the header of a JPEG
jpeg_region    decodes a part of a JPEG with nvImageCodec, if it is installed
pillow_decode  decodes every other format, with Pillow
metadata       reads EXIF's orientation, and takes damaged metadata out of a file
draws          the random draws of every sample of a batch
view           what evaluation and prediction see of an image: the middle, resized and normalized
crop           chooses crop boxes, decodes them and resizes them: one image at a time
augment        the augmentations after the crop, for a batch
pixels         windows, mirrors, rectangles and resizing of a batch, without any randomness
policy/        RandAugment, TrivialAugment and color jitter of one image
corruptions/   blur, noise, weather and digital damage in five severities
device/        decoding and resizing on a GPU
mix            mixup and CutMix of a micro-batch, on its device

The imports of the first six and of view.py are relative: a logged model carries a copy of these modules, and
loads where this package is not installed (`CARRIED` in tracking/mlflow/logged/write.py).
"""
