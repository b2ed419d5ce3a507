"""What the Triton kernels of all operators share: whether they can run, and how they are configured."""
