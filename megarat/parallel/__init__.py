"""How one model is spread over ranks, and the proof that this does not change what it computes."""
