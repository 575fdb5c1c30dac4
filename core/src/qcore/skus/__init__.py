"""SKU records: known facts about published models, and their comparison with a checkpoint."""
