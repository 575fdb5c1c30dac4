"""Records of published models: what is known of them, and how a checkpoint compares."""
