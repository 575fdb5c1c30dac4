"""One data row's way: schema, render, mask, pack."""
