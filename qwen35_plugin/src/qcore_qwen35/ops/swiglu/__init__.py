"""The product inside the feed-forward map."""
