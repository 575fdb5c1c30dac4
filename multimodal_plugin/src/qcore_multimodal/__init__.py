"""qcore-multimodal: image and video support for Qwen 3.5 and 3.6; `plugin` has the hooks."""
