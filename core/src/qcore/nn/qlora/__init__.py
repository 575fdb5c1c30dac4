"""4-bit linear maps with LoRA: storage, the fused product and its gradients."""
