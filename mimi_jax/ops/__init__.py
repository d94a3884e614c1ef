"""What is computed in one of several ways, and who chooses.

    convolution      convolutions, products and ELU
    attention        windowed attention in plain XLA
    fused_attention  that of accelerators: cuDNN, Pallas
    nearest          the search of a codebook
    triton_kernels   device kernels of SEANet stages
    triton_stages    SEANet stages with them
    pieces           a long input in pieces of time
    policy           which of these computes what

Layers call `policy`. Device kernels for other operations or for whole parts of the network come here too.
"""
