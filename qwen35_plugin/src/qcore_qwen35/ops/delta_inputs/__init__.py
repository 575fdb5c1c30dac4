"""What lies between the projections of the delta net and its rule."""
