"""How long every kernel takes, beside torch eager and compiled, other libraries, and what the GPU could do at most."""
