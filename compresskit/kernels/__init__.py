"""Loss kernels, one folder per op.

`kl_div` starts from logits, `linear_kl` from hidden states and output heads. Each has three implementations of one
definition: `reference` (plain torch), `chunked` (bounded memory, any device), `triton` (its slab's loss on a GPU).
What both share lies here: the divergences, the loss of a slab of logits (`slab`, `forward_kl`, `buckets`,
`slab_triton`), the checks, and the autograd of losses that make their gradients in the forward pass (`gradients`).
"""
