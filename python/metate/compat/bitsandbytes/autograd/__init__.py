"""bitsandbytes.autograd: the products with low-bit weights, under the names of an older place."""
