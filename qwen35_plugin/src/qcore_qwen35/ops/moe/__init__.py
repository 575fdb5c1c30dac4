"""What lies between the products of a mixture of experts: the router, and weighted SwiGLU."""
