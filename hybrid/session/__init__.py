"""A loaded model: opening it, generating with it, its report."""
