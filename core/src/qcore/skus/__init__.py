"""SKU records: facts about published models, their sources, comparison with a checkpoint."""
