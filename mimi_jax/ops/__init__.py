"""What is computed in one of several ways, and who chooses.

    tensor_cores     exact float32 products on the tensor cores of NVIDIA GPUs
    fusible          convolutions and ELU that XLA:GPU fuses with their neighbours
    eigen            gradients of convolutions that XLA:CPU computes fast
    convolution      convolutions, products and ELU
    attention        windowed attention in plain XLA
    fused_attention  that of accelerators: cuDNN, Pallas
    lanes            heads side by side in the ring of a stream, for TPUs
    nearest          the search of a codebook
    few_rows         products, convolutions and loops of steps, for XLA:GPU
    triton_kernels   device kernels of SEANet stages
    triton_stages    SEANet stages with them
    pieces           a long input in pieces of time
    parts            ways to compute parts of the network
    policy           which of these computes what

Layers call `policy`. Device kernels for other operations come here too. Those that need layers are in `nn`.
"""
