"""Triton kernels for NVIDIA GPUs, one file each: kernels, autograd Function, launcher.

Importing a file here needs the package `triton`, so only functions that run on a GPU do it. With the environment
variable TRITON_INTERPRET=1, set before, the kernels run on the CPU, slowly: that is how they are tested anywhere.

Every kernel computes in float32 whatever it reads and writes, and addresses memory with 64-bit offsets.
"""
