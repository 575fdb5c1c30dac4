"""Which plugins are installed, what they answer, and which architecture a model is."""
