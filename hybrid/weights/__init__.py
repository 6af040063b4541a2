"""From a checkpoint to a packed store on disk, and the store itself."""
