"""LoRA adapters in PEFT's layout: names, configuration, reading, deltas."""
