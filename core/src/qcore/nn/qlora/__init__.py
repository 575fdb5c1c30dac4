"""QLoRA linear layers: frozen weights in NF4 or 16 bit, LoRA, and their fused GPU path.

Linear layers:

    linear          `Linear`, the layer that blocks use; torch on CPUs, `fused` on GPUs
    stacked_linear  `Stacked`: several `Linear` with the same input, by one call of `fused` on GPUs
    dora            DoRA: the outputs scaled to trained magnitudes
    lora_layer      base class of `Linear` and of `qcore.nn.moe.experts.Experts`

The fused product, for one or several `Linear` on a GPU:

    fused           `Product`: the computation, forward and backward; in torch, or with kernels
    members         what `fused` needs of each layer, and where its rows and ranks start
    fused_factors   LoRA's A and B as one product reads them
    fused_grads     gradients of A and B by torch
    fused_triton    the Triton kernels, and `fused_tables` the addresses that they read
    fused_verify    verification of the kernels against float32

Storage of weights:

    nf4             NF4 quantization; the reference of reading it back
    nf4_triton      reading it back in one kernel
"""
