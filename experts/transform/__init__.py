"""From trained experts to other ones: sparsified, split, fused and shared, each with a report before and after."""
