"""How functions are compiled: decorator, disk cache, linking, threads, vector units."""
