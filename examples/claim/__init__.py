"""Train dense, infer sparse: the claim of RAT+ measured on real text, against attention alone."""
