"""What blocks are built from: protocols, the QLoRA linear map, attention and the loss."""
