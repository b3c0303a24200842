"""Encoded bytes to pixels of the step's size, augmented by draws that depend on the sample's identity alone.

opened         an image whose header has been read: the boxes that are asked of it, and their scales
decode         bytes → an opened image; a JPEG decodes each part when it is asked for, all else is decoded at once
formats        image formats by the first bytes of a file, and what a file is that holds no image
pillow_decode  decodes every other format, with Pillow
metadata       reads EXIF's orientation, and takes damaged metadata out of a file
draws          the random draws of every sample of a batch
view           what evaluation and prediction see of an image: the middle, resized and normalized
crop           chooses crop boxes, decodes them and resizes them: one image at a time
augment        the augmentations after the crop, for a batch
pixels         windows, mirrors, rectangles and resizing of a batch, without any randomness
policy/        RandAugment, TrivialAugment and color jitter of one image
jpeg/          JPEGs: their headers, and the part of one that a crop needs
corruptions/   blur, noise, weather and digital damage in five severities
device/        decoding and resizing on a GPU
mix            mixup and CutMix of a micro-batch, on its device

The imports of the first five, of view.py and in jpeg/ are relative: a logged model carries a copy of these modules, and
loads where this package is not installed (`CARRIED` in tracking/mlflow/logged/write.py).
"""
