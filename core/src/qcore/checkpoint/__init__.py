"""Model folders: their files, safetensors headers, on-disk layout, tokenizer and chat template."""
