"""Label-efficiency studies: arms, label subsets, cells, and the comparisons between them."""
