"""LoRA adapters in PEFT's format: adapter_config.json, tensor names, targets, deltas."""
