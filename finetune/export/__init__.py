"""From a checkpoint to a folder that is served and shared."""
