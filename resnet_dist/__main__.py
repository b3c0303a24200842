"""Run the command line: `python -m resnet_dist` is `resnet-dist`, and the form that torchrun starts."""

from resnet_dist.cli import main

if __name__ == "__main__":
    main()
