"""Conditional diffusion for image-to-image translation, in plain PyTorch.

Notation, the same everywhere:

    b c h w          batch, channels, height, width; images are float32 in [-1, 1]
    x_0, x_t, x_T    clean, noised, pure noise
    t                timestep, int64, 0 = least noisy
    condition        the reference image the network is shown; b 3 h w
    domain           int64 label of the side to produce; index num_domains is the null label
"""
