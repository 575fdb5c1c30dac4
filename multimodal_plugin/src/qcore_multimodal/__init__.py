"""Images and video for qcore: a modality of Qwen 3.5 and 3.6, found by its entry points."""
