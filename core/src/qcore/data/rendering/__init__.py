"""A checked row to labeled tokens: what is rendered, which tokens are trained, what fits."""
