"""`qcore train`: fine-tunes LoRA over a 4-bit or 16-bit base and writes a PEFT adapter."""
