"""Everything that is to be measured on a GPU, in one call of under ten minutes. It needs neither Ray nor MLflow.

    python -m tests.benchmarks.gpu --out FOLDER [--cifar CIFAR] [--photographs PHOTOGRAPHS] [--parts fast,imagenet]

CIFAR and PHOTOGRAPHS are folders with train/ and eval/, as `resnet-dist prepare` writes them; parts that lack theirs are
left out. Each part runs in a process of its own, a copy of one that has imported, with a time limit of its own; FOLDER has
results.json after every measurement, also where a part or the whole call is cut off. `--parts` takes some of them, which
share the time: `--parts fast,airbench` for 50 seeds of each. Without CUDA nothing is measured:
--rehearse runs every line on a CPU, at tiny sizes; a test does so.

Packages: torch 2.11 or newer, torchvision, pydantic, simplejpeg, safetensors, fsspec, filelock, braceexpand, zstandard,
psutil; for decoding on the GPU also nvidia-nvimgcodec-cu13 and nvidia-nvjpeg.

setting    what all parts share: folders, limits, sizes of a rehearsal
exact      bytes of cache=device, resizing and decoding against a CPU's; speed of the caches
repeat     train.deterministic: what it costs, and whether runs repeat bit for bit
fast       cifar10_fast and cifar10_fast_muon, and airbench94 beside them
airbench   airbench94, written from its paper
imagenet   images/s of ResNet-50: compile modes, channels-last, EMA, shards decoded on the CPU and on the GPU
cifar      cifar10_resnet with 20 and 56 layers, at full length, against the paper
"""
