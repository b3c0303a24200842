"""`resnet-dist bench`: the figures that README's table quotes, as ratios inside one interleaved run."""
