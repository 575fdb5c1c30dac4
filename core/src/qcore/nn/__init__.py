"""Torch side of core: QLoRA linear layers, attention, experts, loss, kernel choice, loading."""
