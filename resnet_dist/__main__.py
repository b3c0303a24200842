"""`python -m resnet_dist` is `resnet-dist`, and what torchrun starts."""

from resnet_dist.cli import main

if __name__ == "__main__":
    main()
