"""Benchmarks of flash_attn2 against the attention kernels that a PyTorch user can reach.

``python -m benchmarks --help`` lists the commands. Every command writes one JSON file under
``benchmarks/results/`` with the device, the versions, the commit, the method and the numbers;
``summarize`` and ``plot`` read such a file.
"""
