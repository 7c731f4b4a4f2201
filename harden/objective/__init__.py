"""Loss terms, a file each: small functions of a model and some rows, which the training loop weighs and adds."""
