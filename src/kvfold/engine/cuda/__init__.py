"""Fold and attend on NVIDIA GPUs: CUDA C++ shipped as source, compiled for the user's chip at run time by NVRTC."""
