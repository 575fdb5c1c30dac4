"""Model folders: hub download, safetensors headers, tensor layout, tokenizer, chat template."""
