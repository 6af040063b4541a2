"""What a transformers model consists of: experts, norms, routers, read or tried out."""
